"""What every question is told."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """Where the model and the alpaca rows are, how often everything is measured, where files may be written.

    `rows` of the data are trained on.
    """

    model: Path
    data: Path
    repeats: int
    rows: int
    work: Path
    results: Path
