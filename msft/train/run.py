"""A run from its recipe to its last line: training, evaluation or prediction."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict

from msft import console
from msft.backend.contract import Batch
from msft.backend.mesh import Mesh
from msft.config import derive
from msft.config.schema import Recipe
from msft.data.batches import BatchStream
from msft.errors import Stopped
from msft.files import write_json
from msft.launch import heartbeat
from msft.train import checkpoint, finish, loop, outputs, resume, schedules, setup, versions
from msft.train.metrics import EvalRecord
from msft.train.predict import predict
from msft.train.prepare import Prepared, prepare, processes
from msft.train.reporter import Reporter
from msft.train.saving import Saver
from msft.train.signals import StopRequests


def run(recipe: Recipe, dry: bool = False, resume_command: str = "--resume_training True") -> None:
    """Do what a recipe's `run_mode` says; `dry` checks everything and tells the plan without importing a framework.

    `resume_command` is what a stopped run tells its user to type. Raises InputError before a framework is imported
    wherever that can be known, RunError when the run fails, Stopped when a signal ends it.
    """
    prepared = prepare(recipe)
    if dry:
        _tell_plan(prepared)
        console.say("dry run: nothing was started")
        return
    if recipe.run_mode == "predict":
        return predict(prepared)
    _train(prepared, resume_command) if prepared.trains else _evaluate(prepared)


def _tell_plan(prepared: Prepared) -> None:
    stream = setup.train_stream(prepared, Mesh(prepared.layout.data)) if prepared.trains else None
    for line in setup.plan_lines(prepared, stream):
        console.note(line)


def _train(prepared: Prepared, resume_command: str) -> None:
    digest = prepared.train_data.digest()
    stream = setup.train_stream(prepared, Mesh(prepared.layout.data))
    facts = _facts(prepared, stream, digest)
    state = _state_to_resume(prepared, facts)
    _tell_plan(prepared)
    session = setup.start(prepared)
    try:
        # The first rank writes; which process that is is known only now.
        with outputs.taken(prepared.output_dir) if session.rank == 0 else contextlib.nullcontext():
            stopped = _train_on(prepared, session, state, facts)
    except KeyboardInterrupt:
        _tell_how_to_resume(prepared, resume_command)
        raise
    finally:
        session.distributed.shutdown()
    if stopped:
        _tell_how_to_resume(prepared, resume_command)
        raise Stopped(stopped)


def _tell_how_to_resume(prepared: Prepared, command: str) -> None:
    steps = checkpoint.steps_in(prepared.output_dir / checkpoint.FOLDER)
    console.note(f"{command} goes on after step {steps[0]}" if steps else "no checkpoint was written")


def _facts(prepared: Prepared, stream: BatchStream, digest: str) -> dict:
    """The fields of TrainerState that stay the same in a run."""
    recipe, report = prepared.recipe, stream.report()
    return {
        "total_steps": stream.total_steps,
        "rows_per_step": report["rows_per_step"],
        "seed": recipe.seed,
        "data": digest,
        "order": {
            "rows": report["rows"],
            "steps_per_epoch": report["steps_per_epoch"],
            "shuffle": recipe.train_dataset.data_loader.shuffle,
            "packing": recipe.train_dataset.packing,
            "length_grouping": recipe.train_dataset.length_grouping,
        },
        "schedule": setup.schedule(recipe, stream)._asdict(),
        "backend": recipe.backend,
        "world": processes(),
        "versions": versions.packages(),
    }


def _state_to_resume(prepared: Prepared, facts: dict) -> checkpoint.TrainerState | None:
    if prepared.resumed is None:
        return None
    state = checkpoint.read_state(prepared.resumed)
    resume.check(state, prepared.resumed, facts)
    return state


def _train_on(prepared: Prepared, session: setup.Session, state: checkpoint.TrainerState | None, facts: dict) -> int:
    """Train and write the results; returns the number of the signal that asked the run to stop, else 0."""
    recipe = prepared.recipe
    stream = setup.train_stream(prepared, session.mesh)
    progress = resume.take_over(session, prepared.resumed, state) if state else loop.Progress()
    start = progress.step
    session.distributed.sum_numbers([0.0])
    if session.rank == 0:
        with outputs.writable(prepared.output_dir):
            outputs.remove_leftovers(prepared.output_dir)
            outputs.set_aside_after(prepared.output_dir, start) if state else outputs.set_aside(prepared.output_dir)
    last = setup.last_step(recipe, stream)
    if start >= last:
        console.note(f"all {last} steps are done already; only the results are written again")
    schedule = schedules.build(setup.schedule(recipe, stream))
    saver = _saver(prepared, session, stream, facts)
    saver.start(start)
    reporter = Reporter(prepared.output_dir, start, last, derive.log_every(recipe), stream.row_numbers)
    with StopRequests() as requests:
        with saver, reporter:
            plan = _plan(prepared, session, stream, saver, last, requests)
            sums = session.distributed.sum_numbers
            stopped = loop.train(session.engine, stream, schedule, plan, progress, reporter, sums)
        if stopped:
            return stopped
        heartbeat.beat(progress.step, "writing the results", patient=True)
        adapter, model = saver.results()
        if session.rank == 0:
            finish.finish(prepared, session, progress, start, stream.report(), adapter, model)
        return requests.asked


def _saver(prepared: Prepared, session: setup.Session, stream: BatchStream, facts: dict) -> Saver:
    data = {"train_dataset": facts["data"]}
    if prepared.eval_data:
        data["eval_dataset"] = prepared.eval_data.digest()
    found = versions.collect(prepared.recipe.backend, session.device, session.world, data)
    return Saver(prepared, session, stream, found, facts)


def _plan(
    prepared: Prepared,
    session: setup.Session,
    stream: BatchStream,
    saver: Saver,
    last: int,
    requests: StopRequests,
) -> loop.Plan:
    evaluation, saving = derive.evaluation(prepared.recipe), derive.saving(prepared.recipe)
    eval_stream = setup.eval_stream(prepared, session.mesh) if evaluation else None

    def evaluate(step: int) -> EvalRecord:
        epoch = step / stream.steps_per_epoch
        # Beside the bar of the steps; plain logs get the result only.
        steps = _with_bar(eval_stream) if sys.stderr.isatty() else eval_stream.steps()
        return loop.evaluate(session.engine, steps, session.distributed.sum_numbers, step, epoch)

    return loop.Plan(
        last_step=last,
        eval_steps=evaluation and evaluation.every_steps,
        eval_epoch_steps=evaluation and evaluation.every_epochs and evaluation.every_epochs * stream.steps_per_epoch,
        save_steps=saving and saving.every_steps,
        evaluate=evaluate if evaluation else None,
        save=saver.checkpoint if saving else None,
        save_stopped=saver.checkpoint,
        asked=lambda: requests.asked,
        max_skipped=derive.max_skipped_steps(prepared.recipe),
        dynamic_scale=derive.loss_scale(prepared.recipe, session.device).window > 0,
    )


def _with_bar(stream: BatchStream) -> Iterator[list[Batch]]:
    return console.track(stream.steps(), stream.total_steps, "evaluating")


def _evaluate(prepared: Prepared) -> None:
    _tell_plan(prepared)
    session = setup.start(prepared)
    try:
        stream = setup.eval_stream(prepared, session.mesh)
        record = loop.evaluate(session.engine, _with_bar(stream), session.distributed.sum_numbers, 0, 0.0)
        if session.rank == 0:
            write_json(prepared.output_dir / outputs.EVALUATION, _evaluation(prepared, record))
    finally:
        session.distributed.shutdown()
    console.say(
        f"eval loss {record.eval_loss:.6f}, perplexity {record.perplexity:.6g} "
        f"over {record.eval_supervised:,} supervised tokens"
    )


def _evaluation(prepared: Prepared, record: EvalRecord) -> dict:
    values = asdict(record)
    return {
        "loss": values["eval_loss"],
        "perplexity": values["perplexity"],
        "supervised": values["eval_supervised"],
        "seconds": values["eval_seconds"],
        "weights": prepared.weights.describe(),
        "data_sha256": prepared.eval_data.digest(),
    }
