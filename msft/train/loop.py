"""The training loop: batches in, optimizer steps, records, evaluations and checkpoints out."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from msft import console
from msft.backend.contract import Batch, Engine, StepResult
from msft.data.batches import BatchStream
from msft.errors import RunError
from msft.launch import heartbeat
from msft.train.health import is_bad, shown_rows
from msft.train.metrics import EvalRecord, StepRecord, perplexity
from msft.train.schedules import Schedule
from msft.train.signals import SIGNALS

SumOverRanks = Callable[[Sequence[float]], list[float]]


@dataclass
class Progress:
    """How far a run is: steps of data taken, steps among them that were skipped, real tokens seen on all ranks."""

    step: int = 0
    skipped: int = 0
    tokens: int = 0


class Observer(Protocol):
    """Who hears of steps and evaluations."""

    def step(self, record: StepRecord) -> None:
        """Called after each training step."""

    def evaluated(self, record: EvalRecord) -> None:
        """Called after each pass over the evaluation data."""


@dataclass(frozen=True)
class Plan:
    """When what happens, in steps: the run ends after `last_step`; None for an interval means never.

    `evaluate` is called every `eval_steps`, every `eval_epoch_steps` and at the end, `save` every `save_steps` and
    at the end, and `save_stopped` when `asked` gives the number of a signal (0 = none) on any rank. After
    `max_skipped` bad steps in a row (`health.is_bad`, which `dynamic_scale` is for) the run fails.
    """

    last_step: int
    eval_steps: int | None = None
    eval_epoch_steps: int | None = None
    save_steps: int | None = None
    evaluate: Callable[[int], EvalRecord] | None = None
    save: Callable[[Progress], None] | None = None
    save_stopped: Callable[[Progress], None] | None = None
    asked: Callable[[], int] = lambda: 0
    max_skipped: int = 10
    dynamic_scale: bool = False


def train(
    engine: Engine,
    stream: BatchStream,
    schedule: Schedule,
    plan: Plan,
    progress: Progress,
    observer: Observer,
    sum_over_ranks: SumOverRanks,
) -> int:
    """Go from `progress` to `plan.last_step`; the schedule's step is the number of steps not skipped so far.

    Returns the number of the signal that ended the run before its last step, else 0. A checkpoint that is due in a
    row of bad steps waits for a good one. Raises RunError after `plan.max_skipped` bad steps in a row.
    """
    bad, saved, due, first = 0, progress.step, False, progress.step + 1
    began = time.perf_counter()
    for micro_batches in _up_to(stream, progress.step, plan.last_step):
        # The first step compiles.
        heartbeat.beat(progress.step + 1, "computing the step", patient=progress.step + 1 == first)
        rate = schedule(progress.step - progress.skipped)
        result = engine.train_step(micro_batches, rate)
        progress.step += 1
        bad = bad + 1 if is_bad(result, plan.dynamic_scale) else 0
        tokens, stopped = _over_ranks(sum_over_ranks, sum(batch.tokens for batch in micro_batches), plan.asked())
        progress.tokens += tokens
        progress.skipped += result.skipped
        seconds = time.perf_counter() - began
        epoch = progress.step / stream.steps_per_epoch
        observer.step(
            StepRecord(
                step=progress.step,
                epoch=epoch,
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                tokens=tokens,
                supervised=result.supervised,
                tokens_per_second=tokens / seconds,
                seconds=seconds,
                loss_scale=result.loss_scale,
                skipped=result.skipped,
                balance=result.balance,
            )
        )
        if bad >= plan.max_skipped:
            raise RunError(_failure(result, progress.step, bad, saved, stream.row_numbers(progress.step - 1)))
        if stopped:
            heartbeat.beat(progress.step, "saving", patient=True)
            if plan.save_stopped and not bad:
                plan.save_stopped(progress)
            return stopped
        if plan.evaluate and _due(progress.step, plan.last_step, plan.eval_steps, plan.eval_epoch_steps):
            observer.evaluated(plan.evaluate(progress.step))
        now_due = bool(plan.save) and _due(progress.step, plan.last_step, plan.save_steps)
        due = due or now_due
        if now_due and bad:
            console.note(f"step {progress.step}: the checkpoint waits for a step that is not skipped")
        if due and not bad:
            # It may wait for the checkpoint before, which a thread is writing.
            heartbeat.beat(progress.step, "saving", patient=True)
            plan.save(progress)
            saved, due = progress.step, False
        heartbeat.beat(progress.step + 1, "reading data")
        began = time.perf_counter()
    heartbeat.beat(progress.step, "saving", patient=True)
    return 0


def _over_ranks(sum_over_ranks: SumOverRanks, tokens: int, asked: int) -> tuple[int, int]:
    """Return the tokens of all ranks and the signal that one of them got: all stop after the same step."""
    tokens, *counts = sum_over_ranks([tokens, *(float(asked == number) for number in SIGNALS)])
    return int(tokens), next((int(number) for number, count in zip(SIGNALS, counts, strict=True) if count), 0)


def _up_to(stream: BatchStream, start: int, last: int):
    """Yield the stream's steps from `start` to before `last`, and stop its thread whatever happens."""
    if start >= last:
        return
    steps = stream.steps(start)
    try:
        for _, micro_batches in zip(range(start, last), steps, strict=False):
            yield micro_batches
    finally:
        steps.close()


def _due(step: int, last: int, *intervals: int | None) -> bool:
    return step == last or any(interval and step % interval == 0 for interval in intervals)


def _failure(result: StepResult, step: int, bad: int, saved: int, rows: list[int]) -> str:
    kept = f"the checkpoint of step {saved} is untouched" if saved else "nothing was saved"
    return (
        f"step {step}: the loss is {result.loss} (gradient norm {result.grad_norm}), {shown_rows(rows)}; no step of "
        f"the last {bad} could be taken (runner_config.max_skipped_steps); the run stops, {kept}. "
        "A lower learning rate, gradient clipping or a compute dtype with more range usually helps"
    )


def evaluate(
    engine: Engine, steps: Iterable[list[Batch]], sum_over_ranks: SumOverRanks, step: int, epoch: float
) -> EvalRecord:
    """Return the mean loss over all supervised tokens of this rank's evaluation batches and the other ranks'.

    `step` and `epoch` say how far the run is. Raises RunError if no token is supervised.
    """
    began = time.perf_counter()
    loss, supervised = 0.0, 0
    for number, micro_batches in enumerate(steps):
        # Lengths of rows that training had not are compiled.
        heartbeat.beat(step, "evaluating", patient=number == 0)
        for batch in micro_batches:
            batch_loss, batch_supervised = engine.evaluate(batch)
            loss += batch_loss
            supervised += batch_supervised
    loss, supervised = sum_over_ranks([loss, supervised])
    if not supervised:
        raise RunError("eval_dataset: no token is supervised, so there is no loss to measure")
    mean = loss / supervised
    return EvalRecord(step, epoch, mean, perplexity(mean), int(supervised), time.perf_counter() - began)
