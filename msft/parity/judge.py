"""The verdict of a stage: what is compared how, and whether it is near enough."""

import math
from dataclasses import dataclass

from msft.parity.compare import (
    BARS,
    Difference,
    Row,
    Verdict,
    compare_checks,
    compare_facts,
    compare_numbers,
    difference,
    ratio,
    verdict_of,
)
from msft.parity.observe import Observation, leads_of

ALL_PARAMETERS = "all parameters after the last step"
# How much wider bars are than 1e-5 (fp32) and 1e-2 (bf16), and why. A single gradient tensor of a 135M model is up to
# 2e-4 from its float64 value in float32, a layer's gradient norm 1e-5. Adam divides by the root of the second moment,
# which amplifies the rounding of gradients near zero.
TENSOR_SLACK = 100.0
PARAMETER_SLACK = 10.0
NUMBER_SLACK = {"gradient norm of ": 10.0, "change of all parameters": 10.0}
# A tensor whose difference is below this part of the whole gradient is noise: key biases have no gradient but that.
NOISE = 1e-6


@dataclass(frozen=True)
class StageResult:
    """A stage's rows in their order, the worst verdict among them, and the first row beyond the bar (None = passed).

    `labels` name the left and the right side, `notes` are what each of them told, `cause` is why the stage failed.
    """

    stage: str
    labels: tuple[str, str]
    verdict: Verdict
    bar: Verdict
    rows: list[Row]
    first: Row | None
    notes: dict[str, dict]
    cause: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is beyond the bar."""
        return self.first is None

    @property
    def worst(self) -> Row | None:
        """The row whose error is nearest to its bar, or furthest beyond it."""
        return max(self.rows, key=lambda row: row.error / row.slack, default=None)


def judge(stage: str, left: tuple[str, Observation], right: tuple[str, Observation], bar: Verdict) -> StageResult:
    """Compare what two sides (label, observation) saw in a stage; `bar` is the worst verdict that passes."""
    (left_name, a), (right_name, b) = left, right
    rows = compare_checks({left_name: a, right_name: b})
    facts = compare_facts(a.facts, b.facts)
    rows += [_answer(row, a, b) for row in facts] if stage == "generation" else facts
    rows += compare_numbers(a.numbers, b.numbers, NUMBER_SLACK)
    rows += ARRAYS.get(stage, _relative_rows)(a, b)
    verdict = max((row.verdict for row in rows), default=Verdict.BIT_EQUAL)
    first = next((row for row in rows if row.verdict > bar), None)
    notes = {left_name: a.notes, right_name: b.notes}
    return StageResult(stage, (left_name, right_name), verdict, bar, rows, first, notes)


def _answer(row: Row, a: Observation, b: Observation) -> Row:
    """Answers that part where the best token led by no more than rounding are within rounding."""
    if not row.name.startswith("answer") or row.verdict is Verdict.BIT_EQUAL:
        return row
    left, right = row.details["left"] or [], row.details["right"] or []
    parts = [number for number, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]]
    if not parts:
        return Row(row.name, Verdict.DIVERGES, math.inf, {**row.details, "lengths": [len(left), len(right)]})
    leads = [seen.notes[leads_of(row.name)][parts[0]] for seen in (a, b)]
    details = {**row.details, "first difference at token": parts[0] + 1, "lead of the best token there": leads}
    return Row(row.name, verdict_of(min(leads)), min(leads), details)


def _pairs(a: Observation, b: Observation) -> list[tuple[str, Difference | None]]:
    """Every tensor that either side has, with its difference; None where there is nothing to compare."""
    pairs = []
    for name in dict.fromkeys((*a.arrays, *b.arrays)):
        left, right = a.arrays.get(name), b.arrays.get(name)
        comparable = left is not None and right is not None and tuple(left.shape) == tuple(right.shape)
        pairs.append((name, difference(left, right) if comparable else None))
    return pairs


def _row(name: str, found: Difference | None, error: float, slack: float, a: Observation, b: Observation) -> Row:
    if found is None:
        shapes = {side: _shape(seen, name) for side, seen in (("left", a), ("right", b))}
        return Row(name, Verdict.DIVERGES, math.inf, shapes)
    error = 0.0 if found.equal else max(error, math.ulp(0.0))
    details = {"cosine": found.cosine, "norms": [found.left_norm, found.right_norm], **found.details}
    return Row(name, verdict_of(error, slack), error, details, slack=slack)


def _shape(seen: Observation, name: str) -> str:
    return f"shape {tuple(seen.arrays[name].shape)}" if name in seen.arrays else "absent"


def _relative_rows(a: Observation, b: Observation) -> list[Row]:
    """By the norm of the difference."""
    return [_row(name, found, found.relative if found else math.inf, 1.0, a, b) for name, found in _pairs(a, b)]


def _gradient_rows(a: Observation, b: Observation) -> list[Row]:
    """By the norm of the difference, with the bars of single tensors; what is noise beside the whole set passes."""
    pairs = _pairs(a, b)
    total = math.sqrt(sum(found.right_norm**2 for _, found in pairs if found))
    return [_row(name, found, _beyond_noise(found, total), TENSOR_SLACK, a, b) for name, found in pairs]


def _beyond_noise(found: Difference | None, total: float) -> float:
    if found is None:
        return math.inf
    return min(found.relative, ratio(found.gap, NOISE * total) * BARS[Verdict.FP32] * TENSOR_SLACK)


def _moment_rows(a: Observation, b: Observation) -> list[Row]:
    """First and second moments, each kind held against the whole of its kind."""
    kinds = ("first moment", "second moment")
    parts = [[_of_kind(seen, kind) for seen in (a, b)] for kind in kinds]
    return [row for left, right in parts for row in _gradient_rows(left, right)]


def _of_kind(seen: Observation, kind: str) -> Observation:
    return Observation(arrays={name: array for name, array in seen.arrays.items() if name.startswith(kind)})


def _parameter_rows(a: Observation, b: Observation) -> list[Row]:
    """All parameters together are judged; each is a part of it."""
    pairs = _pairs(a, b)
    if any(found is None for _, found in pairs):
        return _relative_rows(a, b)
    gap = math.sqrt(sum(found.gap**2 for _, found in pairs))
    total = math.sqrt(sum(found.right_norm**2 for _, found in pairs))
    error = ratio(gap, total)
    parts = {name: ratio(found.gap, total) for name, found in pairs}
    details = {"share of the norm, by tensor": parts}
    return [Row(ALL_PARAMETERS, verdict_of(error, PARAMETER_SLACK), error, details, slack=PARAMETER_SLACK)]


ARRAYS = {"backward": _gradient_rows, "step": _moment_rows, "trajectory": _parameter_rows}
