"""The folder of a run, `output_dir`: what lies in it, and where earlier results go."""

import contextlib
import fcntl
from pathlib import Path

from msft import console
from msft.errors import InputError, RunError
from msft.files import leftovers, remove
from msft.train import checkpoint, ckpt_export

ADAPTER, MODEL, RECIPE, VERSIONS = "adapter", "model", "recipe.yaml", "versions.json"
LOG, EVENTS, CURVE, SUMMARY = "trainer_log.jsonl", "tensorboard", "training_loss.png", "train_summary.json"
EVALUATION, PREDICTIONS, DEEPSPEED = "eval_summary.json", "predictions.jsonl", "deepspeed.json"
FOLDERS = (checkpoint.FOLDER, ckpt_export.FOLDER, ADAPTER, MODEL, EVENTS)
RESULTS = (*FOLDERS, RECIPE, VERSIONS, DEEPSPEED, LOG, CURVE, SUMMARY)
EARLIER, LOCK = "earlier", ".lock"


def is_result(output_dir: Path, path: Path) -> bool:
    """Whether a path is, or lies in, what a run has written to `output_dir`."""
    path = path.resolve()
    return any(path.is_relative_to(place) and place.exists() for place in _places(output_dir))


@contextlib.contextmanager
def writable(path: Path):
    """Turn the system's refusals to write (full disk, no permission, a vanished folder) into one RunError.

    Those that a converter has told already, of a file with a temporary name, are told of `path` too.
    """
    try:
        yield
    except (OSError, RunError) as error:
        refusal = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(refusal, OSError):
            raise
        raise RunError(f"{path}: cannot be written: {refusal.strerror or refusal}") from refusal


@contextlib.contextmanager
def taken(output_dir: Path):
    """Keep other runs out of `output_dir` inside; the system ends that when the process dies.

    Raises InputError when another run is writing there, RunError when the folder cannot be written.
    """
    with writable(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = open(output_dir / LOCK, "a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"output_dir: another run is writing to {output_dir}: wait for it, or choose another folder"
            raise InputError(message) from None
        except OSError as error:
            console.warn(f"{output_dir}: cannot be locked ({error.strerror}), so no second run is kept out of it")
        yield


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed run has left half-written, and say so."""
    ckpts = output_dir / ckpt_export.FOLDER
    folders = (output_dir, output_dir / checkpoint.FOLDER, output_dir / ADAPTER, ckpts, ckpts / ckpt_export.RANK)
    for path in [path for folder in folders for path in leftovers(folder)]:
        remove(path)
        console.note(f"{path}: left half-written by a run that was killed, removed")


def set_aside(output_dir: Path) -> None:
    """Move an earlier run's results to `output_dir/earlier/run-N`: a new run neither mixes with nor removes them."""
    results = [place for place in _places(output_dir) if place.exists()]
    if results:
        _move(output_dir, results)


def set_aside_after(output_dir: Path, step: int) -> None:
    """Move an earlier attempt's end results, and its checkpoints of later steps, out of a resumed run's way."""
    checkpoints = output_dir / checkpoint.FOLDER
    later = [checkpoints / f"step-{number}" for number in checkpoint.steps_in(checkpoints) if number > step]
    ends = [output_dir / name for name in (ADAPTER, MODEL, SUMMARY) if (output_dir / name).exists()]
    if later or ends:
        _move(output_dir, [*later, *ends])


def _places(output_dir: Path) -> list[Path]:
    return [output_dir.resolve() / name for name in RESULTS]


def _move(output_dir: Path, paths: list[Path]) -> None:
    number = 1
    while (output_dir / EARLIER / f"run-{number}").exists():
        number += 1
    place = output_dir / EARLIER / f"run-{number}"
    for path in paths:
        target = place / path.resolve().relative_to(output_dir.resolve())
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    console.note(f"{output_dir}: earlier results were moved to {place}")
