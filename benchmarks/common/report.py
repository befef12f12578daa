"""Answers as a table for people, JSON for programs, and a picture of the ratios."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common.answer import Answer, Figure, Verdict

MEGA = 1 << 20
# What the picture shows of a bar that is met by far.
BEST = 100


def figures_table(figures: Sequence[Figure]) -> str:
    """Return a Markdown table of measured figures: median, all repeats, peak memory, loss."""
    rows = [
        (figure.name, f"{figure.value:.4g} {figure.unit}", spread(figure), megabytes(figure.peak), loss(figure.loss))
        for figure in figures
    ]
    return table(("measured", "median", "lowest to highest", "peak memory", "loss"), rows)


def verdicts_table(verdicts: Sequence[Verdict]) -> str:
    """Return a Markdown table of bars: ours, peer, ratio, bar, whether it is met, both losses, both peaks."""
    head = ("bar", "ours", "peer", "ratio", "limit", "", "losses", "peak memory")
    return table(head, [verdict_row(verdict) for verdict in verdicts])


def verdict_row(verdict: Verdict) -> tuple[str, ...]:
    """Return one bar as the cells of a table."""
    peer = "" if verdict.peer is None else f"{verdict.peer:.4g} {verdict.unit}"
    ratio = "" if verdict.peer is None else f"{verdict.ratio:.3g}"
    limit = f"{'>=' if verdict.at_least else '<='} {verdict.limit:g}"
    losses = " / ".join(map(loss, verdict.losses)) if any(verdict.losses) else ""
    peaks = " / ".join(map(megabytes, verdict.peaks)) if any(verdict.peaks) else ""
    met = "met" if verdict.met else "NOT MET"
    return verdict.what, f"{verdict.ours:.4g} {verdict.unit}", peer, ratio, limit, met, losses, peaks


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, rule, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(figure: Figure) -> str:
    """Return the lowest and the highest repeat."""
    return f"{min(figure.values):.4g} to {max(figure.values):.4g}"


def megabytes(size: float | None) -> str:
    """Return bytes in MB (of 2^20), nothing for None."""
    return "" if size is None else f"{size / MEGA:.0f} MB"


def loss(value: float | None) -> str:
    """Return a loss, nothing for None."""
    return "" if value is None else f"{value:.4f}"


def text(name: str, answer: Answer) -> str:
    """Return a question's whole answer in Markdown."""
    parts = [f"## {name}: {answer.question}", verdicts_table(answer.verdicts), figures_table(answer.figures)]
    return "\n\n".join(parts + ["\n".join(f"- {note}" for note in answer.notes)]).rstrip() + "\n"


def write_json(path: Path, answers: dict[str, Answer], machine: dict) -> None:
    """Write every number with the machine and the versions it was measured on."""
    values = {name: asdict(answer) | {"verdicts": verdict_values(answer)} for name, answer in answers.items()}
    path.write_text(json.dumps({"machine": machine, "questions": values}, indent=1), encoding="utf-8")


def verdict_values(answer: Answer) -> list[dict]:
    """Return the bars of an answer with what follows from them."""
    return [asdict(verdict) | {"ratio": verdict.ratio, "met": verdict.met} for verdict in answer.verdicts]


def draw(path: Path, answers: dict[str, Answer]) -> None:
    """Draw every bar as its ratio over its limit: right of 1 it is on the side that the limit asks for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    named = [(name, verdict) for name, answer in answers.items() for verdict in answer.verdicts]
    figure, axes = pyplot.subplots(figsize=(11, 1 + 0.4 * len(named)), layout="constrained")
    shares = [share(verdict) for _, verdict in named]
    colours = ["tab:green" if verdict.met else "tab:red" for _, verdict in named]
    axes.barh(range(len(named)), shares, color=colours)
    axes.set_yticks(range(len(named)), [f"{name}: {verdict.what}" for name, verdict in named])
    for place, (_, verdict) in enumerate(named):
        limit = f"{'>=' if verdict.at_least else '<='} {verdict.limit:g}"
        axes.text(shares[place], place, f" {verdict.ratio:.3g} ({limit})", va="center")
    axes.axvline(1, color="black")
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel("how far on the right side of the bar (1 = just met)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def share(verdict: Verdict) -> float:
    """Return how far a bar is met: 1 is just met, 2 is twice as good as asked, `BEST` at most (a cost may be 0)."""
    if verdict.at_least:
        return min(verdict.ratio / verdict.limit, BEST)
    return verdict.limit / max(verdict.ratio, verdict.limit / BEST)
