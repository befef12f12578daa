"""What a parity check tells and leaves behind: a line a stage, the table, `parity.json`, `parity.png`."""

import math
from pathlib import Path
from typing import Any

from msft import console
from msft.files import write_json
from msft.parity import picture
from msft.parity.compare import BARS, Row, Verdict
from msft.parity.judge import StageResult
from msft.parity.observe import STAGES
from msft.train import plot

RESULTS, CURVES = "parity.json", "parity.png"
PART = 0.01


def tell(result: StageResult) -> None:
    """Say a stage's verdict as soon as it is known."""
    console.note(f"{result.stage}: {result.verdict}" + ("" if result.passed else f", FAILED (bar: {result.bar})"))
    if result.stage == "data":
        console.note(f"data: the first sample has {result.notes[result.labels[0]]['sample']}")


def write(output_dir: Path, results: list[StageResult], steps: int, labels: list[str], perturb: bool) -> None:
    """Write the report's files and print the table and the last word."""
    output_dir.mkdir(parents=True, exist_ok=True)
    values = {"labels": labels, "steps": steps, "passed": _complete(results)}
    stages = {result.stage: _strict(as_json(result)) for result in results}
    write_json(output_dir / RESULTS, {**values, "stages": stages})
    written = [str(output_dir / RESULTS)]
    trajectory = next((result for result in results if result.stage == "trajectory"), None)
    if trajectory and plot.installed():
        picture.save(labels, trajectory_numbers(trajectory), output_dir / CURVES)
        written.append(str(output_dir / CURVES))
    for line in table(results, labels):
        console.say(line)
    if trajectory:
        console.say(trajectory_line(trajectory))
    console.say(f"written: {', '.join(written)}")
    console.say(_last_word(results, labels, perturb))


def table(results: list[StageResult], labels: list[str]) -> list[str]:
    """Return the lines of the table of stages."""
    lines = [f"{labels[0]} against {labels[1]}", f"{'stage':<11} {'verdict':<11}  {'largest error':<13}  where"]
    for result in results:
        shown = result.worst if result.passed else result.first
        error = "" if shown is None else f"{shown.error:.2g}"
        where = _where(result, shown)
        lines.append(f"{result.stage:<11} {result.verdict!s:<11}  {error:<13}  {where}".rstrip())
        if not result.passed:
            lines.append(f"{'':<11} FAILED       {result.cause}")
    ran = {result.stage for result in results}
    left = [stage for stage in STAGES if stage not in ran]
    if left:
        lines.append(f"not run: {', '.join(left)} (--all goes on after a failure)")
    return lines


def _where(result: StageResult, shown: Row | None) -> str:
    if result.verdict is Verdict.BIT_EQUAL or shown is None:
        return f"{len(result.rows)} values"
    side = f" ({shown.side})" if shown.side else ""
    gap = shown.details.get("ulps")
    bar = f" (bar {BARS[Verdict.FP32] * shown.slack:g})" if shown.slack != 1 else ""
    return shown.name + side + (f", {gap} ulps" if gap else "") + bar


def trajectory_numbers(result: StageResult) -> dict[str, list[tuple[float, float]]]:
    """Return the pairs of loss, learning rate and gradient norm, by step."""
    kinds = ("loss", "learning rate", "gradient norm")
    return {
        kind: [
            (row.details["left"], row.details["right"]) for row in result.rows if row.name.startswith(f"{kind} of step")
        ]
        for kind in kinds
    }


def trajectory_summary(result: StageResult) -> dict[str, dict]:
    """Return mean and largest relative error of each curve, and the first step that is more than 1 % apart."""
    summary = {}
    for kind, pairs in trajectory_numbers(result).items():
        errors = [0.0 if a == b else abs(a - b) / max(abs(a), abs(b)) for a, b in pairs]
        parted = next((step for step, error in enumerate(errors, start=1) if not error <= PART), None)
        summary[kind] = {
            "mean": math.fsum(errors) / len(errors),
            "max": max(errors),
            "first_step_past_1_percent": parted,
        }
    return summary


def trajectory_line(result: StageResult) -> str:
    """Return one line about how far the curves are apart."""
    parts = []
    for kind, errors in trajectory_summary(result).items():
        parted = errors["first_step_past_1_percent"]
        past = f"past 1 % from step {parted}" if parted else "never past 1 %"
        parts.append(f"{kind} mean {errors['mean']:.1e} max {errors['max']:.1e} {past}")
    return f"trajectory, relative: {'; '.join(parts)}"


def as_json(result: StageResult) -> dict:
    """Return a stage for `parity.json`."""
    value = {
        "verdict": str(result.verdict),
        "bar": str(result.bar),
        "passed": result.passed,
        "first_difference": result.first and result.first.name,
        "side": result.first.side if result.first else "",
        "cause": result.cause,
        "rows": [_row(row) for row in result.rows],
        "notes": result.notes,
    }
    if result.stage == "trajectory":
        value["summary"] = trajectory_summary(result)
    return value


def _row(row: Row) -> dict:
    side = {"side": row.side} if row.side else {}
    bars = [bar * row.slack for bar in BARS.values()]
    return {"name": row.name, "verdict": str(row.verdict), "error": row.error, "bars": bars, **side, **row.details}


def _strict(value: Any) -> Any:
    """JSON knows no infinity and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _complete(results: list[StageResult]) -> bool:
    """Whether every stage ran and passed; an error in a stage ends the check before."""
    return len(results) == len(STAGES) and all(result.passed for result in results)


def _last_word(results: list[StageResult], labels: list[str], perturb: bool) -> str:
    if perturb:
        return "natural drift of one ulp on one engine: a fault shows as more than this"
    failed = next((result for result in results if not result.passed), None)
    if failed is None and not _complete(results):
        return f"parity: not finished, {len(results)} of {len(STAGES)} stages ran: nothing is proven"
    if failed is None:
        return f"parity: {labels[0]} and {labels[1]} are the same run"
    return f"parity: FAILED at {failed.stage}: {failed.first.name}: {failed.cause}"
