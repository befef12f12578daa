"""The stages of training and after it: one optimizer step, the trajectory, generation."""

import numpy as np

from msft.backend import positions
from msft.backend.contract import IGNORE, Batch, Sampling
from msft.config import derive
from msft.models import rope
from msft.parity import adamw
from msft.parity.adamw import Update
from msft.parity.compare import BARS, Verdict
from msft.parity.fingerprint import fingerprint, norm
from msft.parity.observe import Observation, leads_of
from msft.parity.side import Side

PROMPTS, NEW_TOKENS = 2, 64
BUCKET = 64
# Of a longer prompt the end is taken: the logits of prompt and answer are made at once.
PROMPT_TOKENS = 256
UPDATE, FROZEN = "nearest form of the update", "frozen weights stay"


def observe_step(side: Side) -> Observation:
    """One optimizer step at the recipe's peak rate: moments, decayed tensors, and each update against AdamW's formula.

    The peak rate, because a warm-up starts at 0 and would move nothing.
    """
    rate = derive.learning_rate(side.prepared.recipe)
    gradients, before = side.engine.step_gradients(side.first_step), side.engine.export_state()
    result = side.engine.train_step(side.first_step, rate)
    after = side.engine.export_state()
    side.engine.import_state(before)
    seen = Observation(facts={"skipped": result.skipped, "decayed tensors": list(side.engine.decayed())})
    seen.numbers |= {"learning rate of the first step": side.schedule(0), "loss scale": result.loss_scale}
    squares = sum(norm(after.weights[name] - before.weights[name]) ** 2 for name in after.weights)
    seen.numbers["change of all parameters"] = squares**0.5
    seen.checks[FROZEN] = float(_frozen_changed(side, set(after.weights), seen))
    if result.skipped:
        seen.notes[UPDATE] = "none: the step was skipped, its loss or gradient is not finite"
        return seen
    settings, counted = derive.optimizer(side.prepared.recipe), int(after.counters["optimizer_step"])
    for name in after.weights:
        update = Update(name, before.weights[name], after, rate, counted)
        clipped = gradients.gradients[name] * np.float32(gradients.clip)
        seen.checks |= adamw.moment_errors(update, clipped, settings)
        seen.checks[f"update of {name}"] = error = adamw.update_error(update, settings)
        if not error <= BARS[Verdict.FP32] and UPDATE not in seen.notes:
            seen.notes[UPDATE] = adamw.nearest_form(update, settings)
        seen.arrays[f"first moment of {name}"] = after.first_moment[name]
        seen.arrays[f"second moment of {name}"] = after.second_moment[name]
    return seen


def _frozen_changed(side: Side, tuned: set[str], seen: Observation) -> bool:
    """Whether the step has moved a weight that is not tuned; the first one is noted."""
    for name, array, _ in side.engine.parameters():
        tied = name == side.prepared.spec.head and side.engine.is_head_tied()
        if name not in tuned and not tied and fingerprint(array).sha256 != side.hashes[name]:
            seen.notes[FROZEN] = name
            return True
    return False


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
    encoder, border = side.prepared.spec.encoder, rope.border(side.prepared.spec)
    # What stands between a prompt and the answer: of an encoder-decoder, the decoder's first token.
    between = [encoder.start_id] if encoder else []
    prompts = prompts_of(side.first_step[0], len(between))
    most = positions.most_tokens(side.prepared.spec)
    if border:
        # One pass over a text that crosses it is not what its tokens were chosen by.
        prompts, most = [prompt[-(border // 2 or 1) :] for prompt in prompts], border
    room = NEW_TOKENS if most is None else min(NEW_TOKENS, most - max(map(len, prompts)))
    answers = side.engine.generate(prompts, Sampling(max_new_tokens=room))
    texts = [prompt + between + answer for prompt, answer in zip(prompts, answers, strict=True)]
    logits = side.engine.logits(_as_batch(texts, [*map(len, prompts)] if encoder else []))
    seen = Observation(facts={"new tokens": room})
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        seen.facts[f"prompt {number}"] = prompt
        seen.facts[f"answer {number}"] = answer
        first = len(prompt) + len(between) - 1
        own = logits[number - 1, first : first + len(answer)]
        seen.checks[f"answer {number} is what its own logits choose"] = _behind(own, answer)
        seen.notes[leads_of(f"answer {number}")] = _leads(own)
    return seen


def _behind(logits: np.ndarray, answer: list[int]) -> float:
    """How far the chosen tokens are behind the best ones at most, as a part of the largest logit.

    `logits` [tokens, vocabulary] come from one pass over prompt and answer, without a key-value cache.
    """
    chosen = logits[np.arange(len(answer)), answer].astype(np.float64)
    return float(((logits.max(axis=-1) - chosen) / np.abs(logits).max(axis=-1)).max())


def _leads(logits: np.ndarray) -> list[float]:
    """The best logit's distance to the second best at each position, as a part of the largest."""
    best = np.sort(logits, axis=-1)[:, -2:].astype(np.float64)
    return ((best[:, 1] - best[:, 0]) / np.abs(logits).max(axis=-1)).tolist()


def prompts_of(batch: Batch, between: int = 0) -> list[list[int]]:
    """Return what stands before the first supervised token of the first rows; half a row where all is supervised.

    Of a packed row the first example is taken. So many tokens `between` prompt and answer are left out.
    """
    prompts = []
    for row in range(min(PROMPTS, len(batch.input_ids))):
        first = batch.segment_ids[row] == 1
        ids = batch.input_ids[row][first]
        supervised = np.flatnonzero(batch.labels[row][first] != IGNORE)
        length = int(supervised[0]) + 1 - between if len(supervised) and supervised[0] else max(1, len(ids) // 2)
        prompts.append(ids[max(0, length - PROMPT_TOKENS) : length].tolist())
    return prompts


def _as_batch(texts: list[list[int]], borders: list[int]) -> Batch:
    """Token ids as right-padded rows of a length that few compilations serve.

    They have labels of no meaning behind `borders`, where an encoder-decoder's targets begin, or none.
    """
    length = -(-max(map(len, texts)) // BUCKET) * BUCKET
    real = np.array([np.arange(length) < len(ids) for ids in texts])
    rows = np.zeros(real.shape, np.int32)
    rows[real] = np.concatenate(texts)
    positions = np.tile(np.arange(length, dtype=np.int32), (len(texts), 1))
    numbers = np.where(real, np.arange(len(texts), dtype=np.int32)[:, None], 0)
    labels = np.full_like(rows, IGNORE)
    if borders:
        labels[real & (positions >= np.array(borders)[:, None])] = 0
    return Batch(rows, labels, positions, real.astype(np.int32), numbers)
