"""TensorBoard event files, written with the `tensorboard` package alone (no TensorFlow, no torch)."""

import importlib.util
import math
import time
from pathlib import Path

from msft.train.metrics import EvalRecord, StepRecord


def installed() -> bool:
    """Whether the tensorboard package is there."""
    return importlib.util.find_spec("tensorboard") is not None


class EventWriter:
    """Scalars `train/...` and `eval/...` by step; a resumed run hides an earlier attempt's later steps."""

    def __init__(self, folder: Path, resumed_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder))
        if resumed_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=resumed_step + 1, session_log=start))

    def write(self, record: StepRecord | EvalRecord) -> None:
        """Add one record's scalars."""
        if isinstance(record, StepRecord):
            names = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "loss_scale", "epoch")
            scalars = {f"train/{name}": getattr(record, name) for name in names}
            if record.balance is not None:
                scalars["train/balance"] = record.balance
        else:
            scalars = {"eval/loss": record.eval_loss, "eval/perplexity": record.perplexity}
        values = [self._summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items() if math.isfinite(x)]
        event = self._event.Event(wall_time=time.time(), step=record.step, summary=self._summary(value=values))
        self._writer.add_event(event)

    def close(self) -> None:
        """Write what is pending and close the file."""
        self._writer.close()
