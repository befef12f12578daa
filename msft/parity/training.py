"""The stages of training and after it: one optimizer step, the trajectory, generation."""

import numpy as np

from msft.backend import names
from msft.backend.contract import IGNORE, Batch, EngineState, Sampling
from msft.config import derive
from msft.parity.compare import ratio
from msft.parity.fingerprint import norm
from msft.parity.observe import Observation, leads_of
from msft.parity.side import Side

PROMPTS, NEW_TOKENS = 2, 64
BUCKET = 64
# What rounding to float32 may move an updated parameter by, as a part of its norm.
ROUNDING = 2.0**-23


def observe_step(side: Side) -> Observation:
    """One optimizer step at the recipe's peak rate: moments, decayed tensors, and each update against AdamW's formula.

    The peak rate, because a warm-up starts at 0 and would move nothing.
    """
    before = side.start
    rate = derive.learning_rate(side.prepared.recipe)
    result = side.engine.train_step(side.first_step, rate)
    after = side.engine.export_state()
    side.engine.import_state(before)
    seen = Observation(facts={"skipped": result.skipped, "decayed tensors": list(side.engine.decayed())})
    seen.numbers |= {"learning rate of the first step": side.schedule(0), "loss scale": result.loss_scale}
    squares = sum(norm(after.weights[name] - before.weights[name]) ** 2 for name in after.weights)
    seen.numbers["change of all parameters"] = squares**0.5
    for name in after.weights:
        seen.checks[f"update of {name}"] = _update_error(side, name, before, after, rate)
        seen.arrays[f"first moment of {name}"] = after.first_moment[name]
        seen.arrays[f"second moment of {name}"] = after.second_moment[name]
    return seen


def _update_error(side: Side, name: str, before: EngineState, after: EngineState, rate: float) -> float:
    """How far a parameter's change is from AdamW's (Loshchilov and Hutter 2019) on the engine's own moments."""
    expected = adamw_change(side, name, before.weights[name], after, rate)
    old, new = (state.weights[name].astype(np.float64) for state in (before, after))
    gap = norm(new - old - expected) - ROUNDING * norm(old)
    return ratio(max(0.0, gap), norm(expected))


def adamw_change(side: Side, name: str, weight: np.ndarray, after: EngineState, rate: float) -> np.ndarray:
    """Return the change in float64 that the recipe's optimizer makes to `weight` with the moments in `after`."""
    settings = derive.optimizer(side.prepared.recipe)
    first, second = (moments[name].astype(np.float64) for moments in (after.first_moment, after.second_moment))
    if settings.bias_correction:
        step = after.counters["optimizer_step"]
        first, second = first / (1 - settings.beta1**step), second / (1 - settings.beta2**step)
    decayed = settings.decay_norms_and_biases or not names.is_norm_or_bias(name)
    decay = settings.weight_decay if decayed else 0.0
    return -rate * (first / (np.sqrt(second) + settings.eps) + decay * weight.astype(np.float64))


def observe_trajectory(side: Side) -> Observation:
    """Loss, learning rate and gradient norm of every step from the start, the parameters after the last one."""
    seen, skipped = Observation(), 0
    for number, micro_batches in enumerate(side.batches(side.steps)):
        rate = side.schedule(number - skipped)
        result = side.engine.train_step(micro_batches, rate)
        skipped += result.skipped
        seen.numbers[f"loss of step {number + 1}"] = result.loss
        seen.numbers[f"learning rate of step {number + 1}"] = rate
        seen.numbers[f"gradient norm of step {number + 1}"] = result.grad_norm
    loss, tokens = side.engine.evaluate(side.first_step[0])
    seen.numbers["loss without dropout after the last step"] = loss / max(tokens, 1)
    seen.facts["skipped steps"] = skipped
    seen.arrays |= side.engine.export_state().weights
    return seen


def observe_generation(side: Side) -> Observation:
    """Greedy tokens after the trajectory, and how far ahead of the second best each one was."""
    prompts = prompts_of(side.first_step[0])
    answers = side.engine.generate(prompts, Sampling(max_new_tokens=NEW_TOKENS))
    logits = side.engine.logits(_as_batch([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]))
    seen = Observation()
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        seen.facts[f"prompt {number}"] = prompt
        seen.facts[f"answer {number}"] = answer
        first = len(prompt) - 1
        seen.notes[leads_of(f"answer {number}")] = _leads(logits[number - 1, first : first + len(answer)])
    return seen


def _leads(logits: np.ndarray) -> list[float]:
    """The best logit's distance to the second best at each position, as a part of the largest."""
    best = np.sort(logits, axis=-1)[:, -2:].astype(np.float64)
    return ((best[:, 1] - best[:, 0]) / np.abs(logits).max(axis=-1)).tolist()


def prompts_of(batch: Batch) -> list[list[int]]:
    """Return what stands before the first supervised token of the first rows; half a row where all is supervised."""
    prompts = []
    for row in range(min(PROMPTS, len(batch.input_ids))):
        ids = batch.input_ids[row][batch.segment_ids[row] != 0]
        supervised = np.flatnonzero(batch.labels[row] != IGNORE)
        length = int(supervised[0]) + 1 if len(supervised) and supervised[0] else max(1, len(ids) // 2)
        prompts.append(ids[:length].tolist())
    return prompts


def _as_batch(texts: list[list[int]]) -> Batch:
    """Token ids as right-padded rows without labels, of a length that few compilations serve."""
    length = -(-max(map(len, texts)) // BUCKET) * BUCKET
    real = np.array([np.arange(length) < len(ids) for ids in texts])
    rows = np.zeros(real.shape, np.int32)
    rows[real] = np.concatenate(texts)
    positions = np.tile(np.arange(length, dtype=np.int32), (len(texts), 1))
    numbers = np.arange(len(texts), dtype=np.int32)
    return Batch(rows, np.full_like(rows, IGNORE), positions, real.astype(np.int32), numbers)
