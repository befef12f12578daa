"""What a question gives: figures as they were measured, and verdicts on the bars."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One measured thing: `values` of every repeat in `unit`, peak bytes of each, and the training loss if it has one.

    `loss` is the mean over the steps of a run.
    """

    name: str
    unit: str
    values: list[float]
    peaks: list[int] = field(default_factory=list)
    loss: float | None = None

    @property
    def value(self) -> float:
        """The median of the repeats."""
        return median(self.values)

    @property
    def peak(self) -> float | None:
        """The median of the peaks in bytes, None where memory was not measured."""
        return median(self.peaks) if self.peaks else None


@dataclass(frozen=True)
class Verdict:
    """A bar: `ours` over `peer`, or `ours` itself when there is no peer, against `limit`.

    `at_least` says on which side of the limit the bar is met; `what` is shown in the table.
    """

    what: str
    ours: float
    peer: float | None
    unit: str
    limit: float
    at_least: bool
    losses: tuple[float | None, float | None] = (None, None)
    peaks: tuple[float | None, float | None] = (None, None)

    @property
    def ratio(self) -> float:
        """Ours over the peer's, or ours alone."""
        return self.ours if self.peer is None else self.ours / self.peer

    @property
    def met(self) -> bool:
        """Whether the bar is met."""
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit


@dataclass
class Answer:
    """A question's result: `raw` holds every number of every repeat, `notes` say what a reader must know."""

    question: str
    figures: list[Figure]
    verdicts: list[Verdict]
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)


def compare(what: str, ours: Figure, peer: Figure, limit: float, at_least: bool) -> Verdict:
    """Return the verdict on a bar between two figures' medians."""
    return Verdict(
        what, ours.value, peer.value, ours.unit, limit, at_least, (ours.loss, peer.loss), (ours.peak, peer.peak)
    )


def compare_peaks(what: str, ours: Figure, peer: Figure, limit: float) -> Verdict:
    """Return the verdict on a bar for peak memory: ours at most `limit` times the peer's."""
    mega = 1 << 20
    return Verdict(what, ours.peak / mega, peer.peak / mega, "MB", limit, False)


def absolute(what: str, value: float, unit: str, limit: float, at_least: bool = False) -> Verdict:
    """Return the verdict on a bar that has no peer."""
    return Verdict(what, value, None, unit, limit, at_least)
