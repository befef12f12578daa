"""Checkpoints: whole folders `output_dir/checkpoints/step-N` from which a run goes on, on either engine.

A folder holds the tuned weights (a PEFT adapter, a Hugging Face model, or both), `optimizer.safetensors` with the
moments (or, where several processes hold parts of these, the files of `sliced.py`), `trainer_state.json`,
`recipe.yaml`, `versions.json`, and a manifest with the size and SHA-256 of all of them. It is written under a temporary
name, flushed to disk, and appears by one rename.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from msft import console
from msft.backend.contract import EngineState, StateParts
from msft.convert import safetensors_file
from msft.convert.dtypes import Cast
from msft.convert.source import TensorInfo
from msft.convert.stored import StoredTensors
from msft.errors import InputError, RunError
from msft.files import atomic_path, remove, write_json
from msft.train import lazy, manifest, sliced

STATE, OPTIMIZER, FOLDER = "trainer_state.json", "optimizer.safetensors", "checkpoints"
_MOMENTS = ("first_moment", "second_moment")


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands after `step` steps.

    `rows_per_step` counts rows over all micro-batches and ranks. `data` is the SHA-256 of the training rows and
    `tuned` the canonical names of the tensors that are trained. `tokens` and `skipped` are totals of the run.
    `order` decides with seed and rows_per_step which rows a step takes (rows and steps of an epoch; shuffled, packed,
    grouped by length or not), `position` is where the data stands: epoch and step in it, from 0, and rows taken in
    all. `random` is all that dropout and the order of rows are functions of. `schedule` holds `schedules.Resolved`,
    `versions` the packages.
    """

    step: int
    epoch: float
    total_steps: int
    rows_per_step: int
    seed: int
    data: str
    order: dict[str, int | bool]
    position: dict[str, int]
    random: dict[str, int]
    schedule: dict[str, str | int | float]
    tokens: int
    skipped: int
    counters: dict[str, float]
    tuned: tuple[str, ...]
    backend: str
    world: int
    versions: dict[str, str | None]


def folder(output_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return output_dir / FOLDER / f"step-{step}"


def write(
    path: Path, state: TrainerState, engine_state: EngineState, write_files: Callable[[Path, EngineState], None]
) -> None:
    """Write a checkpoint; `write_files(folder, engine_state)` makes the folder with weights, recipe and versions.

    An interruption or an error leaves nothing behind. Raises RunError when a tensor is not finite.
    """
    check_finite(path, engine_state)
    with atomic_path(path) as temporary:
        write_files(temporary, engine_state)
        _write_moments(temporary / OPTIMIZER, engine_state)
        write_json(temporary / STATE, asdict(state))
        manifest.write(temporary)


def write_parts(
    path: Path, token: str, state: TrainerState, parts: StateParts, world: int, write_files: Callable[[Path], None]
) -> None:
    """Write a checkpoint of which every process has written, or is writing, its parts; called on the first one.

    `token` is what they all know its temporary name by, `write_files(folder)` adds adapter, recipe and versions.
    """
    with atomic_path(path, token) as temporary:
        temporary.mkdir(exist_ok=True)
        write_files(temporary)
        sliced.write(temporary, 0, parts)
        write_json(temporary / STATE, asdict(state))
        manifest.write(temporary, sliced.wait(temporary, world))


def check_finite(path: Path, state: EngineState | StateParts) -> None:
    """Raise RunError naming the first tensor with a number that is not finite; `path` is what would be written."""
    for kind in ("weights", *_MOMENTS):
        for name, array in getattr(state, kind).items():
            if not np.isfinite(array).all():
                what = "" if kind == "weights" else f" ({kind.replace('_', ' ')})"
                raise RunError(f"{path}: not written: tensor {name!r}{what} holds numbers that are not finite")


def _write_moments(path: Path, state: EngineState) -> None:
    arrays = {f"{kind}.{name}": array for kind in _MOMENTS for name, array in getattr(state, kind).items()}
    tensors = {name: TensorInfo(array.shape, array.dtype.name) for name, array in arrays.items()}
    keep = Cast(None)
    with open(path, "wb") as file:
        writer = safetensors_file.SafetensorsWriter(file, tensors)
        for name, array in arrays.items():
            writer.add(name, keep.pieces(name, array))
        writer.close()


def steps_in(checkpoints: Path) -> list[int]:
    """Return the steps that have a checkpoint folder, newest first."""
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in checkpoints.glob("step-*") if path.is_dir()]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def latest_whole(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint whose manifest holds; a damaged one is named and passed over."""
    for step in steps_in(checkpoints):
        path = checkpoints / f"step-{step}"
        problems = manifest.problems(path)
        if not problems:
            return path
        console.warn(f"{path} is damaged and passed over: {problems[0]}")
    return None


def find(resume: bool | str, output_dir: Path) -> Path | None:
    """Return the checkpoint that `resume_training` asks for: True the newest whole one, a path that one (or the
    newest below it), False none. Raises InputError when what was asked for is absent or damaged.
    """
    if resume is False:
        return None
    if resume is True:
        place = output_dir / FOLDER
    else:
        place = Path(resume)
        if (place / STATE).exists() or (place / manifest.NAME).exists():
            problems = manifest.problems(place)
            if problems:
                raise InputError(*(f"resume_training: {problem}" for problem in problems))
            return place
        if (place / FOLDER).is_dir():
            place = place / FOLDER
    path = latest_whole(place)
    if path is None and resume is not True:
        raise InputError(f"resume_training: {resume} holds no whole checkpoint (a folder step-N with {manifest.NAME})")
    return path


def read_state(path: Path) -> TrainerState:
    """Return a whole checkpoint's trainer state, its fields' types checked; the tensors are not read."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(TrainerState).validate_json((path / STATE).read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")
        raise InputError(f"{path / STATE}: is not what this version of msft writes ({what})") from error
    except OSError as error:
        raise InputError(f"{path / STATE}: cannot be read: {error.strerror}") from error


def read_moments(path: Path) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Return a checkpoint's first and second moments by canonical name; they are read when they are asked for."""
    if sliced.is_sliced(path):
        return sliced.Tensors(path, "first_moment"), sliced.Tensors(path, "second_moment")
    source = StoredTensors(safetensors_file.read_index(path / OPTIMIZER))
    first, second = (
        {name.removeprefix(f"{kind}."): name for name in source.tensors if name.startswith(f"{kind}.")}
        for kind in _MOMENTS
    )
    return lazy.stored(source, first), lazy.stored(source, second)


def prune(checkpoints: Path, keep: int, newest: int) -> None:
    """Keep the `keep` newest checkpoints up to the one of step `newest`, which is whole, and remove older ones."""
    for step in [step for step in steps_in(checkpoints) if step <= newest][keep:]:
        remove(checkpoints / f"step-{step}")
