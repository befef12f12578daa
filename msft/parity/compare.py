"""Two observations of a stage, held against each other."""

import enum
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from msft.parity.fingerprint import Fingerprint, fingerprint, norm
from msft.parity.observe import Observation

NEAR = 1e-3  # of an element's value: the share of elements within it is told


class Verdict(enum.IntEnum):
    """How near two results are; the values order from best to worst."""

    BIT_EQUAL = 0
    FP32 = 1
    BF16 = 2
    DIVERGES = 3

    def __str__(self) -> str:
        return ("BIT-EQUAL", "WITHIN fp32", "WITHIN bf16", "DIVERGES")[self]


BARS = {Verdict.FP32: 1e-5, Verdict.BF16: 1e-2}


@dataclass(frozen=True)
class Row:
    """One thing compared; `error` is relative, `side` names the side that is wrong by itself (a check).

    The bars that its verdict comes from are `BARS` times `slack`.
    """

    name: str
    verdict: Verdict
    error: float
    details: dict[str, Any] = field(default_factory=dict)
    side: str = ""
    slack: float = 1.0


def verdict_of(error: float, slack: float = 1.0) -> Verdict:
    """Return the verdict of a relative error; `slack` widens both bars."""
    if error == 0:
        return Verdict.BIT_EQUAL
    # Not "error > bar", so that NaN diverges.
    return next((verdict for verdict, bar in BARS.items() if error <= bar * slack), Verdict.DIVERGES)


def compare_facts(left: dict[str, Any], right: dict[str, Any]) -> list[Row]:
    """Return a row for each fact that either side has."""
    rows = []
    for name in dict.fromkeys((*left, *right)):
        a, b = left.get(name), right.get(name)
        equal = a == b
        details = {"both": a} if equal else {"left": a, "right": b}
        rows.append(Row(name, Verdict.BIT_EQUAL if equal else Verdict.DIVERGES, 0.0 if equal else math.inf, details))
    return rows


def compare_numbers(left: dict[str, float], right: dict[str, float], slack: dict[str, float]) -> list[Row]:
    """Return a row for each number, with its distance in units of the last float32 place.

    `slack` maps beginnings of names to how much wider their bars are.
    """
    rows = []
    for name in dict.fromkeys((*left, *right)):
        a, b = left.get(name, math.nan), right.get(name, math.nan)
        error = 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))
        details = {"left": a, "right": b, "ulps": ulps(a, b)}
        wider = next((factor for start, factor in slack.items() if name.startswith(start)), 1.0)
        rows.append(Row(name, verdict_of(error, wider), error, details, slack=wider))
    return rows


def compare_checks(sides: dict[str, Observation]) -> list[Row]:
    """Return a row for each side's own checks, named for the side; an error within the fp32 bar is as good as none."""
    checks = [(side, name, error) for side, seen in sides.items() for name, error in seen.checks.items()]
    return [Row(name, _check_verdict(error), error, {}, side) for side, name, error in checks]


def _check_verdict(error: float) -> Verdict:
    verdict = verdict_of(error)
    return Verdict.BIT_EQUAL if verdict is Verdict.FP32 else verdict


def ulps(a: float, b: float) -> int | None:
    """Return how many float32 numbers lie between two numbers (1 = neighbours); None for what is no finite float32."""
    with np.errstate(over="ignore"):
        pair = np.array([a, b], np.float32)
    if not np.isfinite(pair).all():
        return None
    whole = pair.view(np.int32).astype(np.int64)
    # Negative floats count downwards from zero.
    whole = np.where(whole < 0, -(2**31) - whole, whole)
    return int(abs(whole[0] - whole[1]))


@dataclass(frozen=True)
class Difference:
    """The difference of two tensors; `gap` is its L2 norm, estimated from the samples where only those are known."""

    equal: bool
    gap: float
    left_norm: float
    right_norm: float
    cosine: float
    details: dict[str, Any]

    @property
    def relative(self) -> float:
        """The gap as a part of the right tensor's norm."""
        return ratio(self.gap, self.right_norm)


def ratio(part: float, whole: float) -> float:
    """Return part / whole; 0 when both are 0."""
    return 0.0 if part == 0 else part / whole if whole else math.inf


def difference(left: np.ndarray | Fingerprint, right: np.ndarray | Fingerprint) -> Difference:
    """Compare two tensors of one shape, whole where both are whole."""
    if isinstance(left, Fingerprint) or isinstance(right, Fingerprint):
        return _of_fingerprints(fingerprint(left), fingerprint(right))
    a, b = left.reshape(-1), right.reshape(-1)
    equal = a.tobytes() == b.tobytes()
    gap = a - b
    norms = norm(a), norm(b)
    details = {
        "max_abs": float(np.abs(gap).max()),
        "mean_abs": float(np.abs(gap).mean(dtype=np.float64)),
        "share_within_1e-3": float((np.abs(gap) <= NEAR * np.abs(b)).mean()),
    }
    return Difference(equal, norm(gap), *norms, _cosine(a, b, equal), details)


def _of_fingerprints(left: Fingerprint, right: Fingerprint) -> Difference:
    sampled = difference(left.sample, right.sample)
    equal = left.sha256 == right.sha256
    spread = math.sqrt(left.size / len(left.sample))
    # The norms know of elements between the samples.
    gap = 0.0 if equal else max(sampled.gap * spread, abs(left.norm - right.norm))
    details = {f"{name} of {len(left.sample)} samples": value for name, value in sampled.details.items()}
    details["sha256"] = left.sha256 if equal else [left.sha256, right.sha256]
    return Difference(equal, gap, left.norm, right.norm, sampled.cosine, details)


def _cosine(a: np.ndarray, b: np.ndarray, equal: bool) -> float:
    if equal:
        return 1.0
    product = norm(a) * norm(b)
    return float(np.einsum("i,i->", a, b, dtype=np.float64)) / product if product else 0.0
