"""From the first difference to its likely cause, in words that say what to look at."""

import re
import statistics
from collections.abc import Sequence

import numpy as np

from msft.parity.computation import ACCUMULATION, OFF, OWN_LOSS, own_loss_error
from msft.parity.fingerprint import fingerprint, norm
from msft.parity.judge import StageResult
from msft.parity.observe import Observation
from msft.parity.side import Side
from msft.parity.training import FROZEN, UPDATE

# An adapter's effect on its block is nearly linear in its scaling.
SAME_DIRECTION = 0.98
SHOWN = 3


def cause(result: StageResult, seen: dict[str, Observation], live: Sequence[Side]) -> str:
    """Return one line about why a stage failed; `seen` has both observations by label, `live` the running sides."""
    first = result.first
    if first.side:
        return f"{first.side}: {_of_check(first.side, first.name, seen[first.side], live)}"
    left, right = seen.values()
    return CAUSES[result.stage](result, left, right)


def _of_check(label: str, name: str, seen: Observation, live: Sequence[Side]) -> str:
    """A check names the side that is wrong."""
    if name == OWN_LOSS:
        return _of_own_loss(next((side for side in live if side.label == label), None))
    if name == "normalisation":
        return _of_normalisation(seen)
    if name.startswith("update of "):
        wrong = [check for check, error in seen.checks.items() if check.startswith("update of ") and not error <= 1e-5]
        return f"AdamW on its own moments gives other updates ({len(wrong)} tensors): they are {seen.notes[UPDATE]}"
    if name.endswith(" from its gradient"):
        return "the moments are not those of the clipped gradient: beta1, beta2, the factor of clipping, or loss scale"
    if name == FROZEN:
        return f"{seen.notes[FROZEN]} is not tuned, and a training step has changed it"
    if "own logits choose" in name:
        return (
            "generation takes other tokens than the model's logits say: key-value cache, positions, mask, or adapters"
        )
    return WORDS.get(name, name)


WORDS = {
    "head tied as the model says": "config.json says whether head and embedding are one tensor; the engine differs",
    "rotary layout": "rotary angles or layout are not those of the config: theta, scaling, halves swapped, interleaved",
    ACCUMULATION: "the step's gradient is not the token-weighted sum of its micro-batches' own: "
    "clipping of micro-batches, averaging, or one left out",
    "clip factor of the norm": "the factor of clipping is not max_grad_norm / norm",
}


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


def _of_recipe(result: StageResult, left: Observation, right: Observation) -> str:
    name, (left_name, right_name) = result.first.name, result.labels
    details = result.first.details
    return f"{name} is {details['left']!r} on {left_name}, {details['right']!r} on {right_name}"


def _of_data(result: StageResult, left: Observation, right: Observation) -> str:
    step, _, what = result.first.name.partition(": ")
    if what == "rows":
        return f"the order of the samples differs from {step} on: seed, shuffling, or the rows of the data"
    if what == "row_ids":
        return f"the rows of {step} are numbered otherwise, so dropout would differ"
    return f"the same rows have other {what} in {step}: other data, padding or alignment"


def _of_weights(result: StageResult, left: Observation, right: Observation) -> str:
    name, (left_name, right_name) = result.first.name.removesuffix(": dtype"), result.labels
    if (name in left.arrays) != (name in right.arrays):
        return f"{name} is on {left_name if name in left.arrays else right_name} only"
    if name != result.first.name or name not in right.arrays:
        details = result.first.details
        return f"{result.first.name} is {details['left']} on {left_name}, {details['right']} on {right_name}"
    found = right.arrays[name].sha256
    elsewhere = [other for other, print_ in left.arrays.items() if print_.sha256 == found and other != name]
    if elsewhere:
        return f"{right_name} has under {name} what {left_name} has under {elsewhere[0]}"
    return f"{name} holds other values after loading: another file, dtype, layout, or seed of the adapters"


def _of_forward(result: StageResult, left: Observation, right: Observation) -> str:
    name = result.first.name
    if any(name not in seen.arrays or name + OFF not in seen.arrays for seen in (left, right)):
        names = list(left.arrays)
        before = names[names.index(name) - 1] if name in names[1:] else ""
        return f"{name} is the first to differ" + (f", {before} agrees" if before else "")
    told = f"{name} agrees with the adapters off and differs with them on: "
    effects = [_sample(seen, name) - _sample(seen, name + OFF) for seen in (left, right)]
    idle = [label for label, effect in zip(result.labels, effects, strict=True) if not norm(effect)]
    if idle:
        return f"{told}{idle[0]} does not apply them"
    cosine = float(np.vdot(*effects)) / (norm(effects[0]) * norm(effects[1]))
    if cosine > SAME_DIRECTION:
        left_name, right_name = result.labels
        scale = norm(effects[1]) / norm(effects[0])
        effect = f"those of {right_name} have {scale:.3g} times the effect of {left_name}'s"
        return f"{told}{effect}, so their scaling (alpha / rank) differs"
    return (
        f"{told}not by scaling alone (cosine of the effects {cosine:.3f}): dropout outside training, "
        "an adapter left out in one module, or other A and B"
    )


def _sample(seen: Observation, name: str) -> np.ndarray:
    return fingerprint(seen.arrays[name]).sample


def _of_loss(result: StageResult, left: Observation, right: Observation) -> str:
    return (
        f"{result.first.name} differs, although each engine's loss without dropout is that of its logits and these "
        "agree: dropout in training (mask, scaling, which step's), or which labels count"
    )


def _of_backward(result: StageResult, left: Observation, right: Observation) -> str:
    left_name, right_name = result.labels
    rows = [row for row in result.rows if "norms" in row.details]
    beyond = [row for row in rows if row.verdict > result.bar]
    wrong = beyond or rows
    zero = [row.name for row in wrong if 0 in row.details["norms"]]
    if not rows:
        return "the engines have gradients of other tensors"
    if zero:
        return f"no gradient on one engine for {_listed(zero)}"
    scales = [row.details["norms"][0] / row.details["norms"][1] for row in wrong]
    aligned = all(row.details["cosine"] > 0.9999 for row in wrong)
    if aligned and len(wrong) == len(rows) and max(scales) < 1.001 * min(scales):
        return f"every gradient of {left_name} is {scales[0]:.4g} x {right_name}'s: normalisation, scale or clipping"
    if not beyond:
        return f"each gradient is within its bar, yet {result.first.name} is not"
    what = "agree in direction and not in length" if aligned else "differ in direction"
    return f"{len(wrong)} of {len(rows)} gradients {what}: {_listed([row.name for row in wrong])}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _of_step(result: StageResult, left: Observation, right: Observation) -> str:
    name = result.first.name
    if name == "decayed tensors":
        sides = [set(seen.facts[name]) for seen in (left, right)]
        return f"weight decay applies to other tensors: {_listed(sorted(sides[0] ^ sides[1]))}"
    return f"each engine's step follows from its gradients, and {name} differs all the same: the gradients with dropout"


def _of_trajectory(result: StageResult, left: Observation, right: Observation) -> str:
    if not all(np.isfinite(value) for seen in (left, right) for value in seen.numbers.values()):
        return "losses or gradients are not finite: a lower learning rate, or clipping"
    step = re.search(r"step (\d+)", result.first.name)
    since = f"from step {step[1]} on" if step else "after the last step"
    return (
        f"every part of one step agrees, the runs part {since}: state carried between steps (moments, step count, "
        "dropout, schedule), or rounding that grows (--perturb shows how much is natural)"
    )


def _of_generation(result: StageResult, left: Observation, right: Observation) -> str:
    details = result.first.details
    if "first difference at token" not in details:
        return f"{result.first.name} differs in length: how answers end"
    place, leads = details["first difference at token"], details["lead of the best token there"]
    return (
        f"tokens part at {place}, where the best led by {max(leads):.2g} of the largest logit, and each engine's "
        "answer is what its own logits choose: the weights after training differ"
    )


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
