"""A recipe's layout of processes against one process: the same steps, loss and gradient norm of each compared."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from msft import console
from msft.backend.contract import StepResult
from msft.config import derive
from msft.config.layout import layout as shared
from msft.config.load import load_recipe
from msft.errors import InputError, RunError
from msft.files import write_json
from msft.launch import heartbeat
from msft.launch.layout import Layout
from msft.launch.program import Program
from msft.launch.run import launch
from msft.parity.compare import BARS, Row, Verdict, compare_facts, compare_numbers
from msft.parity.judge import NUMBER_SLACK
from msft.train import schedules, setup
from msft.train.prepare import prepare

COMMAND = ("-m", "msft", "verify_layout")
RESULTS = "verify_layout.json"


@dataclass(frozen=True)
class Job:
    """What is verified: a recipe with its flags, on so many processes of this machine, for some steps."""

    path: str
    flags: tuple[str, ...]
    workers: int
    steps: int
    output_dir: Path


def verify(job: Job) -> bool:
    """Train some steps in one process and in `workers`, tell how far they are apart, return whether within the bar.

    One process has as many more micro-batches as there are shares of a batch. Raises InputError for a layout that does
    not fit, RunError when a process fails.
    """
    recipe = load_recipe(job.path, [*job.flags, "--use_parallel", "True"])
    found = shared(recipe, derive.model_spec(recipe), job.workers)
    whole = {
        "use_parallel": False,
        "runner_config.gradient_accumulation_steps": derive.gradient_accumulation(recipe, found.pipeline) * found.data,
        "micro_batch_interleave_num": 1,
    }
    one = _run(job, 1, tuple(word for key, value in whole.items() for word in (f"--{key}", str(value))))
    many = _run(job, job.workers, ())
    bar = Verdict.FP32 if derive.precision(recipe, one["device"]).compute == "float32" else Verdict.BF16
    rows = compare_facts(one["facts"], many["facts"]) + compare_numbers(one["numbers"], many["numbers"], NUMBER_SLACK)
    return _tell(job, rows, bar, f"one process against {job.workers}: {recipe.backend} on {many['device']}, {found}")


def record(job: Job, file: Path) -> None:
    """Train a process's share of the steps; the first one writes what it saw to a JSON file."""
    heartbeat.start()
    prepared = prepare(load_recipe(job.path, job.flags))
    session = setup.start(prepared)
    try:
        results = _train(prepared, session, job.steps)
    finally:
        session.distributed.shutdown()
    if session.rank == 0:
        seen = {f"step {number}": result for number, result in enumerate(results, start=1)}
        numbers = {f"loss of {step}": result.loss for step, result in seen.items()}
        numbers |= {f"gradient norm of {step}": result.grad_norm for step, result in seen.items()}
        facts = {f"supervised tokens of {step}": result.supervised for step, result in seen.items()}
        write_json(file, {"device": session.device, "numbers": numbers, "facts": facts})


def _train(prepared, session: setup.Session, steps: int) -> list[StepResult]:
    stream = setup.train_stream(prepared, session.mesh)
    if stream.total_steps < steps:
        raise InputError(f"--steps: the recipe has {stream.total_steps} steps, not {steps}")
    schedule, results = schedules.build(setup.schedule(prepared.recipe, stream)), []
    batches = stream.steps(prefetch=0)
    for step, micro_batches in zip(range(steps), batches, strict=False):
        heartbeat.beat(step + 1, "computing the step", patient=step == 0)
        results.append(session.engine.train_step(micro_batches, schedule(step)))
    batches.close()
    return results


def _run(job: Job, workers: int, flags: tuple[str, ...]) -> dict:
    """What the first of so many processes writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.json"
        words = (*COMMAND, "--record", str(file), "--steps", str(job.steps), "--config", job.path, *job.flags, *flags)
        layout = Layout(workers, workers, log_dir=job.output_dir / f"processes_{workers}")
        launch(layout, Program(words, load_recipe(job.path, [*job.flags, *flags])), dry=False, resume_command="")
        if not file.is_file():
            raise RunError(f"no steps were taken; the logs are in {layout.log_dir}")
        return json.loads(file.read_text())


def _tell(job: Job, rows: list[Row], bar: Verdict, title: str) -> bool:
    console.say(title)
    for kind in ("supervised tokens", "loss", "gradient norm"):
        worst = max((row for row in rows if row.name.startswith(kind)), key=lambda row: (row.verdict, row.error))
        limit = BARS[bar] * worst.slack
        console.say(f"{kind:<17}  {worst.verdict!s:<11}  largest error {worst.error:.2g} ({worst.name}), bar {limit:g}")
    passed = all(row.verdict <= bar for row in rows)
    values = [{"name": row.name, "error": row.error, "verdict": str(row.verdict), **row.details} for row in rows]
    write_json(job.output_dir / RESULTS, {"title": title, "passed": passed, "rows": values})
    console.say(f"written: {job.output_dir / RESULTS}")
    last = f"the same run as one process over {job.steps} steps" if passed else f"FAILED: further apart than {bar}"
    console.say(f"layout: {last}")
    return passed
