"""The loop over a real numpy engine: token means, schedules, records, stopping, evaluation, exact resuming."""

import math

import numpy as np
import pytest

from msft.backend.contract import IGNORE, EngineState
from msft.data.batches import BatchStream, evaluation_batches
from msft.data.dataset import InMemoryDataset
from msft.errors import RunError
from msft.train import checkpoint, loop, schedules
from msft.train.loop import Plan, Progress
from msft.train.weights import read_tuned
from tests.conftest import counting_rows
from tests.train.numpy_engine import NAME, BigramEngine, SkippingEngine

VOCABULARY = 128


class Records:
    """Keeps what the loop reports."""

    def __init__(self):
        self.steps, self.evals = [], []

    def step(self, record):
        self.steps.append(record)

    def evaluated(self, record):
        self.evals.append(record)


def stream(rows=32, **settings):
    given = {"batch_size": 4, "pad_id": 0, "seed": 5, **settings}
    return BatchStream(InMemoryDataset(counting_rows(rows)), **given)


def train(engine, batches, last, progress=None, schedule=None, **plan):
    records = Records()
    schedule = schedule or schedules.constant(0.1)
    loop.train(engine, batches, schedule, Plan(last, **plan), progress or Progress(), records, list)
    return records


def test_the_loss_falls_and_records_are_right():
    engine, batches = BigramEngine(VOCABULARY), stream(epochs=3)
    records = train(engine, batches, batches.total_steps).steps
    assert [record.step for record in records] == list(range(1, 25))
    assert records[0].loss == pytest.approx(math.log(VOCABULARY))
    assert records[-1].loss < 0.7 * records[0].loss
    given = list(batches.steps())
    assert [r.tokens for r in records] == [sum(b.tokens for b in step) for step in given]
    assert [r.supervised for r in records] == [sum(b.supervised for b in step) for step in given]
    assert given[0][0].input_ids.size > records[0].tokens > records[0].supervised > 0
    assert records[7].epoch == 1.0 and records[23].epoch == 3.0
    assert all(r.tokens_per_second == pytest.approx(r.tokens / r.seconds) for r in records)


def test_accumulated_micro_batches_equal_one_bigger_batch():
    # Rows differ in their number of supervised tokens, so a mean of micro-batch means would differ.
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        engine = BigramEngine(VOCABULARY)
        batches = stream(batch_size=size, gradient_accumulation_steps=accumulation)
        runs.append([record.loss for record in train(engine, batches, 4).steps])
        assert len({batch.supervised for batch in next(batches.steps())}) == accumulation
    assert runs[0] == pytest.approx(runs[1], rel=1e-12)


def test_a_skipped_step_does_not_move_the_schedule():
    engine = SkippingEngine(VOCABULARY, skips={2, 3})
    records = train(engine, stream(), 6, schedule=schedules.linear(6.0, 6)).steps
    assert engine.rates == [6.0, 5.0, 5.0, 5.0, 4.0, 3.0]
    assert [r.learning_rate for r in records] == engine.rates
    assert [r.skipped for r in records] == [False, True, True, False, False, False]


def test_the_launcher_is_told_what_a_run_does_and_where_it_may_take_longer(monkeypatch):
    """The first step compiles, and so may the first batch of an evaluation; a save may wait for the disk."""
    signs = []
    monkeypatch.setattr(loop.heartbeat, "beat", lambda step, doing, patient=False: signs.append((step, doing, patient)))
    engine, batches = BigramEngine(VOCABULARY), stream(epochs=3)
    evaluation = evaluation_batches(InMemoryDataset(counting_rows(8)), batch_size=4, pad_id=0)

    def evaluate(step):
        return loop.evaluate(engine, evaluation.steps(), list, step, 0.0)

    train(engine, batches, 5, Progress(step=3), eval_steps=4, evaluate=evaluate, save_steps=4, save=lambda _: None)
    assert signs == [
        (4, "computing the step", True),
        (4, "evaluating", True),
        (4, "evaluating", False),
        (4, "saving", True),
        (5, "reading data", False),
        (5, "computing the step", False),
        (5, "evaluating", True),
        (5, "evaluating", False),
        (5, "saving", True),
        (6, "reading data", False),
        (5, "saving", True),
    ]


def test_evaluation_and_saving_come_when_due_and_at_the_end():
    seen = []
    evaluated = train(
        BigramEngine(VOCABULARY),
        stream(epochs=3),
        11,
        eval_steps=5,
        eval_epoch_steps=8,
        save_steps=4,
        evaluate=lambda step: seen.append(("eval", step)) or step,
        save=lambda progress: seen.append(("save", progress.step)),
    ).evals
    assert evaluated == [5, 8, 10, 11]
    assert [step for kind, step in seen if kind == "save"] == [4, 8, 11]


def test_losses_that_are_not_finite_end_the_run_with_their_rows_and_save_nothing():
    engine, saved, batches = BigramEngine(VOCABULARY), [], stream()
    engine.table[:, 7] = np.nan
    with pytest.raises(RunError, match="step 3: the loss is nan .*nothing was saved") as caught:
        train(engine, batches, 8, save_steps=1, save=saved.append, max_skipped=3)
    assert not saved
    # The rows of step 3 (the third from 0 is 2): four of 32, in the order of the epoch.
    order = np.argsort(np.random.PCG64(np.random.SeedSequence((5, 0))).random_raw(32), kind="stable")
    assert f"rows {', '.join(map(str, order[8:12]))} of train_dataset" in str(caught.value)


def test_bad_steps_count_in_a_row():
    engine = SkippingEngine(VOCABULARY, skips={2, 3, 5, 6, 7}, loss=math.nan)
    with pytest.raises(
        RunError, match=r"step 7: the loss is nan .* the last 3 .*the checkpoint of step 4 is untouched"
    ):
        train(engine, stream(), 8, save_steps=2, save=lambda progress: None, max_skipped=3)
    records = train(SkippingEngine(VOCABULARY, skips={2, 3, 5, 6}, loss=math.nan), stream(), 8, max_skipped=3).steps
    assert [record.skipped for record in records] == [False, True, True, False, True, True, False, False]


@pytest.mark.parametrize("dynamic, scale, fails", [(True, 2.0, False), (True, 1.0, True), (False, 1024.0, True)])
def test_an_overflow_that_a_shrinking_loss_scale_answers_is_no_bad_step(dynamic, scale, fails):
    engine = SkippingEngine(VOCABULARY, skips={2, 3, 4}, scale=scale)
    settings = {"max_skipped": 3, "dynamic_scale": dynamic}
    if fails:
        with pytest.raises(RunError, match="step 4: .*gradient norm inf"):
            train(engine, stream(), 8, **settings)
    else:
        assert sum(record.skipped for record in train(engine, stream(), 8, **settings).steps) == 3


def test_no_checkpoint_among_bad_steps_but_after_them(capsys):
    saved = []
    engine = SkippingEngine(VOCABULARY, skips={2, 3, 4}, loss=math.inf)
    train(engine, stream(epochs=2), 9, save_steps=3, save=lambda progress: saved.append(progress.step))
    assert saved == [5, 6, 9]
    assert capsys.readouterr().err.count("waits for a step that is not skipped") == 1


def test_a_stop_finishes_the_step_saves_and_returns_the_signal():
    asked, saved, records = [0, 0, 0, 15, 15], [], Records()

    def save(progress):
        saved.append(progress.step)

    plan = Plan(9, evaluate=lambda step: 1 / 0, eval_steps=4, save_stopped=save, asked=lambda: asked.pop(0))
    progress = Progress()
    assert (
        loop.train(BigramEngine(VOCABULARY), stream(epochs=2), schedules.constant(0.1), plan, progress, records, list)
        == 15
    )
    assert saved == [4] and progress.step == len(records.steps) == 4


@pytest.mark.parametrize("own, others, expected", [(0, 2, 2), (2, 0, 2), (2, 15, 15), (0, 0, 0)])
def test_all_ranks_stop_when_one_is_asked(own, others, expected):
    def sum_over_two(numbers):
        return [left + right for left, right in zip(numbers, [7, others == 15, others == 2], strict=True)]

    plan, records = Plan(3, asked=lambda: own), Records()
    engine, progress = BigramEngine(VOCABULARY), Progress()
    assert loop.train(engine, stream(), schedules.constant(0.1), plan, progress, records, sum_over_two) == expected
    assert progress.step == (1 if expected else 3)


def test_a_stop_among_bad_steps_saves_nothing():
    engine = SkippingEngine(VOCABULARY, skips={2}, loss=math.nan)
    asked = [0, 2]
    plan = Plan(9, save_stopped=lambda progress: 1 / 0, asked=lambda: asked.pop(0))
    assert loop.train(engine, stream(), schedules.constant(0.1), plan, Progress(), Records(), list) == 2


def test_evaluation_is_the_mean_over_all_supervised_tokens():
    engine = BigramEngine(VOCABULARY)
    engine.table += np.random.default_rng(0).normal(size=engine.table.shape)
    rows = counting_rows(7, seed=3)
    batches = evaluation_batches(InMemoryDataset(rows), batch_size=3, pad_id=0)
    record = loop.evaluate(engine, batches.steps(), list, step=4, epoch=0.5)
    logprobs = engine.table - np.log(np.exp(engine.table).sum(1, keepdims=True))
    losses = [
        -logprobs[given, wanted]
        for row in rows
        for given, wanted in zip(row["input_ids"][:-1], row["labels"][1:], strict=True)
        if wanted != IGNORE
    ]
    assert record.eval_loss == pytest.approx(np.mean(losses))
    assert record.perplexity == pytest.approx(math.exp(np.mean(losses)))
    assert record.eval_supervised == len(losses)


def test_evaluation_without_supervised_tokens_is_an_error():
    rows = [{"input_ids": np.arange(3, 9), "labels": np.full(6, IGNORE)}]
    batches = evaluation_batches(InMemoryDataset(rows), batch_size=1, pad_id=0)
    with pytest.raises(RunError, match="no token is supervised"):
        loop.evaluate(BigramEngine(VOCABULARY), batches.steps(), list, 0, 0.0)


@pytest.mark.parametrize("stop", [3, 8, 9])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, stop):
    # In the first epoch, at its end, and in the second.
    whole = train(BigramEngine(VOCABULARY), stream(epochs=2), 16, schedule=schedules.cosine(0.2, 16)).steps
    first, written = BigramEngine(VOCABULARY), []

    def write_files(folder, state):
        from safetensors.numpy import save_file

        folder.mkdir()
        save_file({NAME: state.weights[NAME]}, folder / "model.safetensors")

    def save(progress):
        state = first.export_state()
        facts = {"total_steps": 16, "rows_per_step": 4, "seed": 5, "data": "", "backend": "numpy", "world": 1}
        facts |= {"order": {}, "position": {}, "random": {}, "schedule": {}, "versions": {}}
        trainer_state = checkpoint.TrainerState(
            **facts,
            step=progress.step,
            epoch=progress.step / 8,
            tokens=progress.tokens,
            skipped=0,
            counters=state.counters,
            tuned=(NAME,),
        )
        written.append(checkpoint.folder(tmp_path, progress.step))
        checkpoint.write(written[-1], trainer_state, state, write_files)

    train(first, stream(epochs=2), stop, schedule=schedules.cosine(0.2, 16), save=save)
    state = checkpoint.read_state(written[-1])
    second = BigramEngine(VOCABULARY)
    moments = checkpoint.read_moments(written[-1])
    second.import_state(EngineState(read_tuned(written[-1], state.tuned), *moments, state.counters))
    progress = Progress(state.step, state.skipped, state.tokens)
    rest = train(second, stream(epochs=2), 16, progress, schedules.cosine(0.2, 16)).steps
    assert [(r.step, r.loss, r.learning_rate, r.tokens) for r in rest] == [
        (r.step, r.loss, r.learning_rate, r.tokens) for r in whole[stop:]
    ]
    assert progress.tokens == sum(r.tokens for r in whole)
