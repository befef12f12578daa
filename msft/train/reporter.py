"""What a training run tells while it runs: progress bar or plain lines, `trainer_log.jsonl`, TensorBoard events."""

import sys
from collections.abc import Callable
from pathlib import Path

from msft import console
from msft.train import outputs, tensorboard
from msft.train.health import Spikes, shown_rows
from msft.train.metrics import EvalRecord, StepRecord, TrainerLog, read_log


class Reporter:
    """Takes the records of a run from step `start` on; on other ranks than the first it does nothing.

    On a terminal a bar shows the last step's numbers; elsewhere a plain line tells of each `every`-th step. Skipped
    steps and spikes of the loss get a line each, with the rows that `rows_of` gives for a step from 0.
    """

    def __init__(self, output_dir: Path, start: int, total_steps: int, every: int, rows_of: Callable[[int], list[int]]):
        self.output_dir, self.total_steps, self.every, self.rows_of = output_dir, total_steps, every, rows_of
        self.first = console.is_first_rank()
        self.sinks: list = []
        self.bar = None
        if not self.first:
            return
        with outputs.writable(output_dir):
            self.sinks.append(TrainerLog(output_dir / outputs.LOG, start))
            if tensorboard.installed():
                self.sinks.append(tensorboard.EventWriter(output_dir / outputs.EVENTS, start))
        self.spikes = Spikes()
        for record in read_log(output_dir / outputs.LOG):
            if "loss" in record:
                self.spikes.add(record["loss"], record["skipped"])
        if sys.stderr.isatty():
            self.bar, self.task = _start_bar(start, total_steps)
        self.clock = _Clock(total_steps - start)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()
        with outputs.writable(self.output_dir):
            for sink in self.sinks:
                sink.close()

    def step(self, record: StepRecord) -> None:
        """Report one training step."""
        if not self.first:
            return
        self._write(record)
        left = self.clock.left(record.seconds)
        if self.bar:
            self.bar.update(self.task, completed=record.step, numbers=_short(record))
        elif record.step % self.every == 0 or record.step in (1, self.total_steps):
            console.note(f"step {record.step}/{self.total_steps} | {_long(record)} | {left} left")
        self._warn(record)

    def evaluated(self, record: EvalRecord) -> None:
        """Report one pass over the evaluation data."""
        if not self.first:
            return
        self._write(record)
        console.note(f"step {record.step}: eval loss {record.eval_loss:.4f}, perplexity {record.perplexity:.4g}")

    def _write(self, record: StepRecord | EvalRecord) -> None:
        with outputs.writable(self.output_dir):
            for sink in self.sinks:
                sink.write(record)

    def _warn(self, record: StepRecord) -> None:
        usual = self.spikes.add(record.loss, record.skipped)
        if record.skipped:
            what = f"skipped, loss {record.loss:.4f}, gradient norm {record.grad_norm:.3g}"
            what += f" at loss scale {record.loss_scale:g}"
        elif usual is not None:
            what = f"the loss jumped to {record.loss:.4f}, usual were {usual:.4f}"
        else:
            return
        console.warn(f"step {record.step}: {what}; {shown_rows(self.rows_of(record.step - 1))}")


class _Clock:
    """Estimates the time left from the steps so far, the first (which may compile) left out where possible."""

    def __init__(self, steps: int):
        self.steps, self.seconds = steps, []

    def left(self, seconds: float) -> str:
        self.steps -= 1
        self.seconds.append(seconds)
        known = self.seconds[1:] or self.seconds
        return clock_time(self.steps * sum(known) / len(known))


def clock_time(seconds: float) -> str:
    """Return seconds as H:MM:SS."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _long(record: StepRecord) -> str:
    balance = "" if record.balance is None else f"balance {record.balance:.4f} | "
    return (
        f"epoch {record.epoch:.2f} | loss {record.loss:.4f} | {balance}lr {record.learning_rate:.3g} | "
        f"grad norm {record.grad_norm:.3g} | {record.tokens_per_second:.0f} tokens/s"
    )


def _short(record: StepRecord) -> str:
    """At most 48 characters, so that bar, count and time left fit beside it in 80."""
    return (
        f"loss {record.loss:.4f} lr {record.learning_rate:.2e} "
        f"grad {record.grad_norm:.3g} {record.tokens_per_second:.0f} tok/s"
    )


def _start_bar(start: int, total_steps: int):
    from rich.progress import TextColumn

    bar = console.progress(TextColumn("{task.fields[numbers]}"), bar_width=8)
    bar.start()
    return bar, bar.add_task("", total=total_steps, completed=start, numbers="")
