"""The stages of one step's computation, at the starting weights with adapters awake: forward, loss, backward."""

import re

import numpy as np

from msft.backend.contract import IGNORE, Batch
from msft.parity.fingerprint import norm
from msft.parity.observe import Observation
from msft.parity.side import Side

OFF = " (adapter off)"


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
    seen = Observation()
    with side.awake():
        step = side.engine.step_gradients(side.first_step)
        seen.checks["loss of its own logits"] = own_loss_error(side, 0)
    seen.numbers["loss"] = step.loss
    for number, (loss, supervised) in enumerate(zip(step.losses, step.supervised, strict=True), start=1):
        seen.facts[f"supervised tokens of micro-batch {number}"] = supervised
        seen.numbers[f"summed loss of micro-batch {number}"] = loss
    mean = sum(step.losses) / sum(step.supervised)
    # Sums may be taken in another order.
    error = abs(step.loss - mean) / abs(mean)
    seen.checks["normalisation"] = error if error > 1e-6 else 0.0
    return seen


def own_loss_error(side: Side, shift: int) -> float:
    """How far the engine's loss is from the cross-entropy of its own logits, with the labels moved by `shift`."""
    probe = side.probe
    if not probe.supervised:
        return 0.0
    logits = side.engine.logits(probe)
    if shift:
        logits = np.roll(logits, shift, axis=1)
    expected = cross_entropy(logits, probe)
    error = abs(side.engine.evaluate(probe)[0] - expected) / abs(expected)
    return error if error > 1e-5 else 0.0


def cross_entropy(logits: np.ndarray, batch: Batch) -> float:
    """Return the summed cross-entropy of a batch's labels under logits [rows, length, vocabulary], in float64."""
    chosen = batch.labels != IGNORE
    picked = logits[chosen].astype(np.float64)
    top = picked.max(axis=-1)
    normalizer = np.log(np.exp(picked - top[:, None]).sum(axis=-1)) + top
    return float((normalizer - picked[np.arange(len(picked)), batch.labels[chosen]]).sum())


def observe_backward(side: Side) -> Observation:
    """The gradients of the first step: their norms, in all and by layer, each tensor, and the factor of clipping."""
    with side.awake():
        step = side.engine.step_gradients(side.first_step)
    seen = Observation(arrays=dict(step.gradients))
    seen.numbers["gradient norm"] = step.grad_norm
    for layer, names in by_layer(step.gradients).items():
        seen.numbers[f"gradient norm of {layer}"] = float(
            np.sqrt(sum(norm(step.gradients[name]) ** 2 for name in names))
        )
    seen.numbers["clip factor"] = step.clip
    return seen


def by_layer(names) -> dict[str, list[str]]:
    """Return tensor names by the block that they belong to, or by themselves outside the blocks."""
    groups: dict[str, list[str]] = {}
    for name in names:
        block = re.search(r"model\.layers\.\d+", name)
        groups.setdefault(block[0] if block else name, []).append(name)
    return groups
