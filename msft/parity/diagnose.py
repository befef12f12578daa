"""From the first difference to its likely cause, in words that say what to look at."""

import re
import statistics
from collections.abc import Sequence

import numpy as np

from msft.parity.computation import OFF, own_loss_error
from msft.parity.fingerprint import fingerprint, norm
from msft.parity.judge import StageResult
from msft.parity.observe import Observation
from msft.parity.side import Side

# An adapter's effect on its block is nearly linear in its scaling.
SAME_DIRECTION = 0.98


def cause(result: StageResult, seen: dict[str, Observation], live: Sequence[Side]) -> str:
    """Return one line about why a stage failed; `seen` has both observations by label, `live` the running sides."""
    first = result.first
    if first.side:
        return _of_check(first.side, first.name, seen, live)
    left, right = seen.values()
    return CAUSES[result.stage](result, left, right)


def _of_check(label: str, name: str, seen: dict[str, Observation], live: Sequence[Side]) -> str:
    """A check names the side that is wrong."""
    side = next((side for side in live if side.label == label), None)
    if name == "head tied as the model says":
        return f"{label}: config.json says whether head and embedding are one tensor, and the engine holds it otherwise"
    if name == "rotary layout":
        return f"{label}: the rotary embedding is not the one of models/rope.py (halves swapped, or interleaved)"
    if name == "loss of its own logits":
        return f"{label}: {_of_own_loss(side)}"
    if name == "normalisation":
        return f"{label}: {_of_normalisation(seen[label])}"
    if name.startswith("update of "):
        return f"{label}: {_of_update(name.removeprefix('update of '), seen[label], label)}"
    return f"{label}: {name}"


def _of_own_loss(side: Side | None) -> str:
    wrong = "its loss is not the cross-entropy of its own logits"
    if side is None:
        return wrong
    for shift in (1, -1):
        if own_loss_error(side, shift) == 0:
            return f"the labels are shifted by one ({shift:+d}): its loss is that of the neighbouring tokens"
    return f"{wrong} at the labels: which positions count, or the loss itself"


def _of_normalisation(seen: Observation) -> str:
    sums = [value for name, value in seen.numbers.items() if name.startswith("summed loss")]
    tokens = [value for name, value in seen.facts.items() if name.startswith("supervised tokens")]
    means = [total / count for total, count in zip(sums, tokens, strict=True) if count]
    if means and abs(statistics.fmean(means) / seen.numbers["loss"] - 1) < 1e-5:
        return "the loss is the mean of the micro-batches' means, not the mean over all supervised tokens"
    return "the loss is not the summed loss of its micro-batches divided by their supervised tokens"


def _of_update(name: str, seen: Observation, label: str) -> str:
    wrong = [check.removeprefix("update of ") for check, error in seen.checks.items() if error > 1e-5]
    which = f"{len(wrong)} tensors" if len(wrong) > 1 else name
    return (
        f"the update of {which} (first: {name}) is not AdamW's on its own moments: bias correction, epsilon, "
        "learning rate, or which tensors are decayed"
    )


def _of_recipe(result: StageResult, left: Observation, right: Observation) -> str:
    name, details = result.first.name, result.first.details
    left_name, right_name = result.labels
    return f"{name} is {details['left']!r} on {left_name}, {details['right']!r} on {right_name}"


def _of_data(result: StageResult, left: Observation, right: Observation) -> str:
    step, _, what = result.first.name.partition(": ")
    if what == "rows":
        return f"the order of the samples differs from {step} on: seed, shuffling, or the rows of the data"
    if what == "row_ids":
        return f"the rows of {step} are numbered otherwise, so dropout would differ"
    return f"the same rows have other {what} in {step}: other data, padding or alignment"


def _of_weights(result: StageResult, left: Observation, right: Observation) -> str:
    name = result.first.name
    if name not in left.arrays or name not in right.arrays:
        return f"{name} is on one side only" if name in {*left.arrays, *right.arrays} else name
    found = right.arrays[name].sha256
    elsewhere = [other for other, print_ in left.arrays.items() if print_.sha256 == found and other != name]
    if elsewhere:
        left_name, right_name = result.labels
        return f"{right_name} has under {name} what {left_name} has under {elsewhere[0]}"
    return f"{name} holds other values after loading: another file, dtype, layout, or seed of the adapters"


def _of_forward(result: StageResult, left: Observation, right: Observation) -> str:
    name = result.first.name
    if name.endswith(OFF) or name + OFF not in left.arrays:
        before = _before(name, list(left.arrays))
        return f"{name} is the first to differ" + (f", {before} agrees" if before else "")
    effects = [_sample(seen, name) - _sample(seen, name + OFF) for seen in (left, right)]
    told = f"{name} agrees with the adapters off and differs with them on: "
    cosine = float(np.vdot(*effects)) / (norm(effects[0]) * norm(effects[1]))
    if cosine > SAME_DIRECTION:
        left_name, right_name = result.labels
        scale = norm(effects[1]) / norm(effects[0])
        effect = f"those of {right_name} have {scale:.3g} times the effect of {left_name}'s"
        return f"{told}{effect}, so their scaling (alpha / rank) differs"
    return f"{told}not by scaling alone (cosine of the effects {cosine:.3f}): dropout outside training, or A and B"


def _sample(seen: Observation, name: str) -> np.ndarray:
    return fingerprint(seen.arrays[name]).sample


def _before(name: str, names: list[str]) -> str:
    place = names.index(name)
    return names[place - 1] if place else ""


def _of_loss(result: StageResult, left: Observation, right: Observation) -> str:
    return f"the logits agree, {result.first.name} does not: labels, masking, or normalisation"


def _of_backward(result: StageResult, left: Observation, right: Observation) -> str:
    rows = [row for row in result.rows if "norms" in row.details and row.details["norms"][1]]
    scales = [row.details["norms"][0] / row.details["norms"][1] for row in rows]
    aligned = all(row.details["cosine"] > 0.9999 for row in rows) and max(abs(scale - 1) for scale in scales) > 1e-3
    if rows and aligned and max(scales) < 1.001 * min(scales):
        left_name, right_name = result.labels
        return f"every gradient of {left_name} is {scales[0]:.4g} x {right_name}'s: normalisation, scale or clipping"
    if rows and aligned:
        odd = max(rows, key=lambda row: abs(row.details["norms"][0] / row.details["norms"][1] - 1))
        return f"directions agree and lengths do not (most: {odd.name}): a factor in the backward pass"
    return "loss and logits agree, gradients do not: accumulation, clipping of micro-batches, or a backward pass"


def _of_step(result: StageResult, left: Observation, right: Observation) -> str:
    name = result.first.name
    if name == "decayed tensors":
        sides = [set(seen.facts[name]) for seen in (left, right)]
        return f"weight decay applies to other tensors: {', '.join(sorted(sides[0] ^ sides[1])[:3])}"
    return f"gradients agree, {name} does not: betas, clipping, or the order of decay and update"


def _of_trajectory(result: StageResult, left: Observation, right: Observation) -> str:
    step = re.search(r"step (\d+)", result.first.name)
    since = f"from step {step[1]} on" if step else "after the last step"
    return (
        f"every part of one step agrees, the runs part {since}: state carried between steps (moments, step count, "
        "dropout, schedule), or rounding that grows (--perturb shows how much is natural)"
    )


def _of_generation(result: StageResult, left: Observation, right: Observation) -> str:
    details = result.first.details
    if "first difference at token" not in details:
        return f"{result.first.name} differs"
    place, leads = details["first difference at token"], details["lead of the best token there"]
    return f"tokens part at {place}, where the best led by {max(leads):.2g} of the largest logit: the key-value cache"


CAUSES = {
    "recipe": _of_recipe,
    "data": _of_data,
    "weights": _of_weights,
    "forward": _of_forward,
    "loss": _of_loss,
    "backward": _of_backward,
    "step": _of_step,
    "trajectory": _of_trajectory,
    "generation": _of_generation,
}
