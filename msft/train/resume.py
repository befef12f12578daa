"""Going on from a checkpoint: what must be as it was, and taking the state over."""

from pathlib import Path

from msft import console
from msft.backend.contract import EngineState
from msft.errors import InputError, RunError
from msft.train import checkpoint
from msft.train.checkpoint import TrainerState
from msft.train.loop import Progress
from msft.train.setup import Session
from msft.train.weights import read_tuned


def check(state: TrainerState, path: Path, facts: dict) -> None:
    """Raise InputError when the run could not go on exactly where the checkpoint ends; say what else differs.

    `facts` are this run's values of the fields of TrainerState that stay the same in a run. The rows of a step are a
    function of data, their order, seed and rows per step; these must be equal.
    """
    rows_per_step, seed, problems = facts["rows_per_step"], facts["seed"], []
    if state.data != facts["data"]:
        problems.append(f"{path}: was trained on other data (its SHA-256 differs): give the data it was trained on")
    if state.rows_per_step != rows_per_step:
        problems.append(
            f"{path}: has {state.rows_per_step} rows a step, this run {rows_per_step} (batch_size x "
            "gradient_accumulation_steps x processes): give settings with the same product"
        )
    if state.seed != seed:
        problems.append(f"{path}: has seed {state.seed}, this run {seed}: the order of rows would differ")
    # Checkpoints from before there was a choice do not name these.
    order = {"packing": False, "length_grouping": False, **state.order}
    if state.rows_per_step == rows_per_step and (different := _differences(order, facts["order"])):
        problems.append(
            f"{path}: {different}: the rows of a step would differ: give the same num_samples, shuffle, "
            "drop_remainder, packing and length_grouping of train_dataset"
        )
    if problems:
        raise InputError(*problems)
    total = facts["total_steps"]
    if state.total_steps != total:
        console.warn(f"{path}: was made for {state.total_steps} steps, this run has {total}: the rates change")
    if different := _differences(state.schedule, facts["schedule"]):
        console.warn(f"{path}: was trained with another schedule: {different}; this run's is followed from here on")


def _differences(before: dict, now: dict) -> str:
    """Say which values differ: 'peak was 0.1, here it is 0.2'; "" when none does."""
    changed = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} was {before.get(name)}, here it is {now[name]}" for name in changed)


def take_over(session: Session, path: Path, state: TrainerState) -> Progress:
    """Put a checkpoint's state into the engine; returns how far the run is.

    Raises RunError when ranks found different checkpoints or the tensors do not fit the recipe.
    """
    total = session.distributed.sum_numbers([float(state.step)])[0]
    if total != state.step * session.mesh.replicas:
        raise RunError(f"resume_training: the processes see different checkpoints; this one sees {path}")
    first, second = checkpoint.read_moments(path)
    session.engine.import_state(EngineState(read_tuned(path, state.tuned), first, second, state.counters))
    console.note(f"resuming after step {state.step} from {path} (written on {state.backend})")
    return Progress(state.step, state.skipped, state.tokens)
