"""`parity.png`: the two loss curves, and the relative errors of loss and gradient norm on a logarithmic scale."""

from pathlib import Path

from msft.files import atomic_path
from msft.parity.compare import BARS, Verdict


def save(labels: list[str], pairs: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Draw (left, right) pairs by step, for 'loss' and 'gradient norm'; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    losses, errors = figure.subplots(2, 1, sharex=True)
    steps = range(1, len(pairs["loss"]) + 1)
    for side, (style, width) in enumerate((("-", 4), ("--", 1.5))):
        values = [pair[side] for pair in pairs["loss"]]
        losses.plot(steps, values, style, linewidth=width, alpha=0.7, label=labels[side])
    losses.set_ylabel("loss (mean over supervised tokens)")
    for kind in ("loss", "gradient norm"):
        gaps = [abs(a - b) / max(abs(a), abs(b), 1e-30) for a, b in pairs[kind]]
        errors.semilogy(steps, [max(gap, 1e-9) for gap in gaps], label=f"{kind}, relative difference")
    errors.axhline(BARS[Verdict.FP32], color="gray", linestyle=":", label="fp32 bar")
    errors.set_xlabel("step")
    for axes in (losses, errors):
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
