"""The stages of one step's computation, at the starting weights with adapters awake: forward, loss, backward."""

import re

import numpy as np

from msft.backend.contract import IGNORE, Batch, StepGradients
from msft.config import derive
from msft.parity.fingerprint import norm
from msft.parity.observe import Observation
from msft.parity.side import Side

OFF = " (adapter off)"
# A block is what its tensors' names have up to their first number, whatever a family calls it.
BLOCK = re.compile(r"(?:base_model\.model\.)?(.*?\.\d+)\.")
OWN_LOSS, ACCUMULATION = "loss of its own logits", "sum of the micro-batches' gradients"


def observe_forward(side: Side) -> Observation:
    """Embedding, every block, final norm and logits of the real tokens; first without the adapters, then with them."""
    probe, seen = side.probe, Observation()
    real = probe.segment_ids != 0
    with side.awake():
        if side.prepared.tuning.lora:
            for name, state in side.engine.activations(probe, adapter=False).items():
                seen.arrays[name + OFF] = state[real]
        for name, state in side.engine.activations(probe).items():
            seen.arrays[name] = state[real]
        seen.arrays["lm_head"] = side.engine.logits(probe)[real]
    return seen


def observe_loss(side: Side) -> Observation:
    """The loss of the first step, of each of its micro-batches, and whether these are what they should be."""
    seen, step = Observation(), side.awake_step
    if side.probe.supervised:
        with side.awake():
            seen.checks[OWN_LOSS] = own_loss_error(side, 0)
    else:
        seen.notes[OWN_LOSS] = "not checked: no token of the first rows is supervised"
    seen.numbers["loss"] = step.loss
    for number, (loss, supervised) in enumerate(zip(step.losses, step.supervised, strict=True), start=1):
        seen.facts[f"supervised tokens of micro-batch {number}"] = supervised
        seen.numbers[f"summed loss of micro-batch {number}"] = loss
    seen.checks["normalisation"] = relative(step.loss, sum(step.losses) / sum(step.supervised))
    return seen


def relative(value: float, expected: float) -> float:
    """Return the relative error of a value; 0 where only the order of additions may differ."""
    error = abs(value - expected) / max(abs(expected), 1e-30)
    # Not "error > ...", so that NaN stays.
    return 0.0 if error <= 1e-6 else error


def own_loss_error(side: Side, shift: int) -> float:
    """How far the engine's loss is from the cross-entropy of its own logits, with the labels moved by `shift`."""
    probe = side.probe
    logits = side.engine.logits(probe)
    expected = cross_entropy(np.roll(logits, shift, axis=1) if shift else logits, probe)
    error = abs(side.engine.evaluate(probe)[0] - expected) / abs(expected)
    return 0.0 if error <= 1e-5 else error


def cross_entropy(logits: np.ndarray, batch: Batch) -> float:
    """Return the summed cross-entropy of a batch's labels under logits [rows, length, vocabulary], in float64."""
    chosen = batch.labels != IGNORE
    picked = logits[chosen].astype(np.float64)
    top = picked.max(axis=-1)
    normalizer = np.log(np.exp(picked - top[:, None]).sum(axis=-1)) + top
    return float((normalizer - picked[np.arange(len(picked)), batch.labels[chosen]]).sum())


def observe_backward(side: Side) -> Observation:
    """The gradients of the first step: their norms, in all and by layer, each tensor, and the factor of clipping."""
    step = side.awake_step
    seen = Observation(arrays=dict(step.gradients))
    del side.awake_step
    if len(side.first_step) > 1:
        seen.checks[ACCUMULATION] = _accumulation_error(side, step)
    seen.numbers["gradient norm"] = step.grad_norm
    for layer, names in by_layer(step.gradients).items():
        squares = sum(norm(step.gradients[name]) ** 2 for name in names)
        seen.numbers[f"gradient norm of {layer}"] = float(np.sqrt(squares))
    seen.numbers["clip factor"] = step.clip
    limit = derive.max_grad_norm(side.prepared.recipe)
    expected = 1.0 if limit is None else min(1.0, limit / (step.grad_norm + 1e-6))
    seen.checks["clip factor of the norm"] = relative(step.clip, expected)
    return seen


def _accumulation_error(side: Side, step: StepGradients) -> float:
    """How far the step's gradient is from its micro-batches' own ones, weighted by their supervised tokens."""
    total, gap = sum(step.supervised), {name: array.copy() for name, array in step.gradients.items()}
    with side.awake():
        for batch in side.first_step:
            if batch.supervised:
                part = side.engine.step_gradients([batch])
                for name, array in part.gradients.items():
                    gap[name] -= np.float32(batch.supervised / total) * array
    whole = sum(norm(array) ** 2 for array in step.gradients.values()) ** 0.5
    return sum(norm(array) ** 2 for array in gap.values()) ** 0.5 / max(whole, 1e-30)


def by_layer(names) -> dict[str, list[str]]:
    """Return tensor names by the block that they belong to, or by themselves outside the blocks."""
    groups: dict[str, list[str]] = {}
    for name in names:
        block = BLOCK.match(name)
        groups.setdefault(block[1] if block else name, []).append(name)
    return groups
