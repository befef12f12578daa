"""Question 8: how time and memory of a training step grow with rows, length, layers and LoRA rank."""

import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common.answer import Answer, Figure, Verdict, absolute
from benchmarks.common.process import run
from benchmarks.common.repeat import interleave
from benchmarks.common.settings import Settings

QUESTION = "growth of a step's time and memory"
PROGRAM = Path(__file__).parent / "programs" / "one_step.py"
ENGINES = ("torch", "mindspore")
BASE = {"rows": 4, "length": 128, "layers": 4, "rank": 16}
SWEEPS = {
    "rows": (2, 4, 8, 16),
    "length": (128, 256, 512, 1024),
    "layers": (2, 4, 8, 16),
    "rank": (8, 16, 32, 64),
}
# The power that a step's cost may grow with: attention's own square in the length, a straight line otherwise.
POWERS = {"rows": 1, "length": 2, "layers": 1, "rank": 1}
# Timings of some milliseconds scatter.
SLACK = 0.1
MEGA = 1 << 20
# Two processes that do the same differ by some MB.
NOISE = 32 * MEGA


def measure(settings: Settings) -> Answer:
    """Measure steps of small random models along four axes on both engines, in turns, and draw them."""
    points = {
        (engine, name, value): BASE | {name: value} for engine in ENGINES for name in SWEEPS for value in SWEEPS[name]
    }
    variants = {
        f"{engine}, {name} {value}": partial(step, engine, sizes) for (engine, name, value), sizes in points.items()
    }
    runs = interleave(variants, settings.repeats)
    figures = {
        key: Figure(name, "s", [run["seconds"] for run in runs[name]], [run["peak"] for run in runs[name]])
        for key, name in zip(points, variants, strict=True)
    }
    draw(settings.results / "growth.png", figures)
    return Answer(QUESTION, list(figures.values()), verdicts(figures), NOTES, runs)


def step(engine: str, sizes: dict[str, int]) -> dict:
    """Return seconds of a steady step and the peak bytes of a process that does nothing else."""
    ran = run([sys.executable, PROGRAM, engine, *map(str, sizes.values())])
    return {"seconds": json.loads(ran.out.splitlines()[-1])["seconds"], "peak": ran.peak}


def verdicts(figures: dict[tuple[str, str, int], Figure]) -> list[Verdict]:
    """Return the growth of each axis as a power, for time and for memory."""
    bars = []
    for engine in ENGINES:
        for name, places in SWEEPS.items():
            points = [figures[engine, name, place] for place in places]
            limit = POWERS[name] + SLACK
            time = time_power([point.value for point in points])
            memory = memory_power([point.peak for point in points])
            bars.append(absolute(f"{engine}, {name}: power of the time's growth", time, "", limit))
            bars.append(absolute(f"{engine}, {name}: power of the memory's growth", memory, "", limit))
    return bars


def time_power(values: Sequence[float]) -> float:
    """Return log2 of the last doubling's growth: 1 is a straight line, 2 a square, fixed costs make it smaller."""
    return math.log2(values[-1] / values[-2])


def memory_power(peaks: Sequence[float]) -> float:
    """Return log2 of the last doubling's step over the step before it, in which what a process holds anyway cancels.

    Steps below NOISE count as NOISE.
    """
    before, last = peaks[-2] - peaks[-3], peaks[-1] - peaks[-2]
    return math.log2(max(last, NOISE) / max(before, NOISE))


def line(places: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return slope and start of the straight line with the least squares."""
    slope, start = np.polyfit(places, values, 1)
    return float(slope), float(start)


def draw(path: Path, figures: dict[tuple[str, str, int], Figure]) -> None:
    """Draw seconds (above) and peak memory (below) against each axis with straight-line fits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(2, len(SWEEPS), figsize=(4 * len(SWEEPS), 7), layout="constrained")
    for column, (name, places) in enumerate(SWEEPS.items()):
        for engine in ENGINES:
            points = [figures[engine, name, value] for value in places]
            draw_line(axes[0, column], engine, places, [point.value for point in points])
            draw_line(axes[1, column], engine, places, [point.peak / MEGA for point in points])
        axes[1, column].set_xlabel(name)
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("peak memory, MB")
    axes[0, 0].legend()
    picture.savefig(path, dpi=110)
    pyplot.close(picture)


def draw_line(axes, engine: str, places: Sequence[int], values: Sequence[float]) -> None:
    """Draw measured points and their straight line."""
    slope, start = line(places, values)
    (points,) = axes.plot(places, values, "o", label=engine)
    axes.plot(places, [start + slope * place for place in places], "--", color=points.get_color())


NOTES = [
    f"A random Llama of hidden size 256, 4 heads, vocabulary 4096; all tokens supervised; around {BASE}.",
    "A power of 1 is a straight line, 2 a square; of the last doubling, where the fastest growing term shows most.",
]
