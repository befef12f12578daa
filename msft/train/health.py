"""Whether a run goes well: steps that could not be taken, and losses that stand out."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from msft.backend.contract import StepResult

WINDOW, LEAST = 50, 10
SHOWN_ROWS = 64


def is_bad(result: StepResult, dynamic_scale: bool) -> bool:
    """Whether a step was lost to a loss or gradient that is not finite.

    An overflow that a dynamic loss scale above 1 can answer by shrinking is none.
    """
    if not math.isfinite(result.loss):
        return True
    return result.skipped and not (dynamic_scale and result.loss_scale > 1)


class Spikes:
    """Finds losses far above the recent ones: the last WINDOW finite ones, once there are LEAST of them.

    A spike is above their median by more than 6 times their median distance from it, and by more than a fifth of it.
    """

    def __init__(self):
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float | None, skipped: bool) -> float | None:
        """Take a step's loss (None or not finite: none); returns the usual loss if this one is a spike, else None."""
        if loss is None or not math.isfinite(loss):
            return None
        usual = self._usual_below(loss) if len(self._recent) >= LEAST and not skipped else None
        self._recent.append(loss)
        return usual

    def _usual_below(self, loss: float) -> float | None:
        usual = median(self._recent)
        distance = median(abs(value - usual) for value in self._recent)
        return usual if loss > usual + max(6 * distance, usual / 5) else None


def spikes(records: Iterable[dict[str, Any]]) -> list[int]:
    """Return the steps of a `trainer_log.jsonl` whose loss is a spike."""
    found = Spikes()
    steps = [record for record in records if "loss" in record]
    return [record["step"] for record in steps if found.add(record["loss"], record["skipped"]) is not None]


def shown_rows(rows: Sequence[int]) -> str:
    """Name the rows of a step by their numbers in the data, from 0; of very many the first ones."""
    more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
    return f"rows {', '.join(map(str, rows[:SHOWN_ROWS]))}{more} of train_dataset"
