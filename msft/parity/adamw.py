"""AdamW's formula (Loshchilov and Hutter 2019) in float64, and the forms of it that a wrong engine may compute."""

from dataclasses import dataclass, replace

import numpy as np

from msft.backend import names
from msft.backend.contract import EngineState, Optimizer
from msft.parity.compare import ratio
from msft.parity.fingerprint import norm

# What rounding to float32 may move an updated parameter by, as a part of its norm.
ROUNDING = 2.0**-23
# A form is recognised when it explains the change this well.
ALIKE = 1e-4


@dataclass(frozen=True)
class Update:
    """One tensor's optimizer step: its values before, the state after, the learning rate, the steps taken so far."""

    name: str
    before: np.ndarray
    after: EngineState
    rate: float
    step: int


def change(update: Update, settings: Optimizer, inside: bool = False) -> np.ndarray:
    """Return the change that AdamW makes with the moments after the step; `inside` adds epsilon under the root."""
    first = update.after.first_moment[update.name].astype(np.float64)
    second = update.after.second_moment[update.name].astype(np.float64)
    if settings.bias_correction:
        first = first / (1 - settings.beta1**update.step)
        second = second / (1 - settings.beta2**update.step)
    root = np.sqrt(second + settings.eps) if inside else np.sqrt(second) + settings.eps
    decayed = settings.decay_norms_and_biases or not names.is_norm_or_bias(update.name)
    decay = settings.weight_decay if decayed else 0.0
    return -update.rate * (first / root + decay * update.before.astype(np.float64))


def update_error(update: Update, settings: Optimizer) -> float:
    """Return how far a parameter's change is from the formula's, beyond rounding, as a part of the change."""
    return _gap(update, change(update, settings))


def _gap(update: Update, expected: np.ndarray) -> float:
    gap = norm(_taken(update) - expected) - ROUNDING * norm(update.before.astype(np.float64))
    return ratio(max(0.0, gap), norm(expected))


def _taken(update: Update) -> np.ndarray:
    return update.after.weights[update.name].astype(np.float64) - update.before.astype(np.float64)


def moment_errors(update: Update, gradient: np.ndarray, settings: Optimizer) -> dict[str, float]:
    """Return how far the moments of a first step are from those of its clipped gradient, by name."""
    if update.step != 1:
        return {}
    wide = gradient.astype(np.float64)
    first, second = (1 - settings.beta1) * wide, (1 - settings.beta2) * wide**2
    found = ((update.after.first_moment, first, "first"), (update.after.second_moment, second, "second"))
    return {
        f"{kind} moment of {update.name} from its gradient": ratio(
            norm(moments[update.name].astype(np.float64) - expected), norm(expected)
        )
        for moments, expected, kind in found
    }


def nearest_form(update: Update, settings: Optimizer) -> str:
    """Return what a wrong update looks like: AdamW in another form, by another factor, or neither."""
    norms = settings.decay_norms_and_biases
    forms = {
        "without bias correction": change(update, replace(settings, bias_correction=False)),
        "with bias correction": change(update, replace(settings, bias_correction=True)),
        "with weight decay on norms and biases": change(update, replace(settings, decay_norms_and_biases=True)),
        "without weight decay": change(update, replace(settings, weight_decay=0.0)),
        "without weight decay on norms and biases": change(update, replace(settings, decay_norms_and_biases=False)),
        "with epsilon inside the root": change(update, settings, inside=True),
    }
    for words, expected in forms.items():
        if _gap(update, expected) <= ALIKE:
            return words
    expected, taken = change(update, settings), _taken(update)
    factor = float(np.vdot(taken, expected)) / max(norm(expected) ** 2, 1e-300)
    if norm(taken - factor * expected) <= ALIKE * norm(taken):
        return f"{factor:.6g} times as large: another learning rate"
    return f"none that is known (norms and biases decayed: {norms}): betas, decay before the moments, or another rule"
