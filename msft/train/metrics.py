"""What a run measures: one record a step, in `trainer_log.jsonl`, one JSON object a line."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msft.files import write_text


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; counts are over all ranks.

    `epoch` counts passes over the data, `tokens` real tokens without padding, `supervised` those in the loss.
    `grad_norm` is the norm before clipping, `seconds` the wall time of the step, `tokens_per_second` real ones.
    `balance` is the experts' balance loss, which the loss has times its coefficient (None: not asked for).
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised: int
    tokens_per_second: float
    seconds: float
    loss_scale: float
    skipped: bool
    balance: float | None = None


@dataclass(frozen=True)
class EvalRecord:
    """One pass over the evaluation data after `step` steps; `eval_loss` is the mean over its supervised tokens."""

    step: int
    epoch: float
    eval_loss: float
    perplexity: float
    eval_supervised: int
    eval_seconds: float


def perplexity(loss: float) -> float:
    """Return e to the mean token loss; infinite where that is beyond a double."""
    return math.exp(loss) if loss < 700 else math.inf


class TrainerLog:
    """`trainer_log.jsonl`, flushed at every line; lines after `resumed_step` of an earlier attempt are dropped."""

    def __init__(self, path: Path, resumed_step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_log(path) if record["step"] <= resumed_step]
        write_text(path, "".join(_line(record) for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: StepRecord | EvalRecord) -> None:
        """Append one record; a number that JSON does not know (infinite, NaN) is written as null."""
        found = asdict(record)
        if found.get("balance", 0.0) is None:
            del found["balance"]
        self._file.write(_line(found))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `trainer_log.jsonl`; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps({key: _finite(value) for key, value in record.items()}) + "\n"


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
