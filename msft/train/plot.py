"""`training_loss.png`: the loss curve of a run, raw and smoothed, with the evaluation points."""

import importlib.util
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msft.files import atomic_path


def installed() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average of `values`, corrected for its start (the mean of what was seen)."""
    average, scale, smoothed = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        scale = weight * scale + (1 - weight)
        smoothed.append(average / scale)
    return smoothed


def save_loss_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Draw the records of a `trainer_log.jsonl` into a PNG file; needs matplotlib."""
    steps = [record for record in records if record.get("loss") is not None]
    evals = [record for record in records if record.get("eval_loss") is not None]
    positions, losses = [record["step"] for record in steps], [record["loss"] for record in steps]
    with _axes(path) as axes:
        axes.plot(positions, losses, color="tab:blue", alpha=0.35, label="loss")
        axes.plot(positions, smooth(losses), color="tab:blue", label="loss, smoothed")
        if evals:
            points = [record["eval_loss"] for record in evals]
            axes.plot([record["step"] for record in evals], points, "o-", color="tab:orange", label="eval loss")


def save_loss_curves(losses: dict[str, list[float]], path: Path) -> None:
    """Draw the losses of one or two runs, by name and step from 1, into one PNG file; needs matplotlib."""
    with _axes(path) as axes:
        for (name, values), (style, width) in zip(losses.items(), (("-", 4), ("--", 1.5)), strict=False):
            axes.plot(range(1, len(values) + 1), values, style, linewidth=width, alpha=0.7, label=name)


@contextmanager
def _axes(path: Path):
    """Yield axes for losses by step; write them to `path` at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    yield axes
    axes.set_xlabel("step")
    axes.set_ylabel("loss (mean over supervised tokens)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
