"""Writing tuned weights so that others can load them: adapters as PEFT folders, models as Hugging Face folders."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from msft.backend.contract import EngineState, Tuning
from msft.convert import safetensors_file
from msft.convert.adapter import CONFIG, WEIGHTS, write_adapter
from msft.convert.hf_folder import read_index, weights_file
from msft.convert.source import TensorInfo, TensorSource
from msft.convert.stored import StoredTensors
from msft.convert.weights import write_hf_folder
from msft.models.adapters import PEFT_PREFIX
from msft.models.spec import ModelSpec
from msft.train import lazy, sliced


class Overlay:
    """A TensorSource in which tuned tensors (float32, by name) take the place of the base's."""

    def __init__(self, base: TensorSource, tuned: Mapping[str, np.ndarray]):
        self.base, self.tuned = base, lazy.chosen(tuned, tuned)
        infos = {name: TensorInfo(shape, "float32") for name, shape in self.tuned.shapes.items()}
        self.tensors = {**base.tensors, **infos}

    def read(self, name: str) -> np.ndarray:
        """Return one tensor."""
        return self.tuned[name] if name in self.tuned else self.base.read(name)

    def file_of(self, name: str) -> str:
        """Return where a tensor comes from, for messages."""
        return "the tuned weights" if name in self.tuned else self.base.file_of(name)


def write_model(
    folder: Path,
    spec: ModelSpec,
    base: TensorSource,
    state: EngineState,
    companions: Mapping[str, bytes | Path],
    bar: bool,
) -> None:
    """Write base and tuned parameters as a new float32 Hugging Face folder, in one rename; `bar` shows progress."""
    tuned = lazy.chosen(state.weights, [name for name in state.weights if not name.startswith(PEFT_PREFIX)])
    write_hf_folder(Overlay(base, tuned), spec, folder, dtype="float32", companions=companions, bar=bar)


def write_lora(folder: Path, spec: ModelSpec, tuning: Tuning, state: EngineState, base_model: str) -> None:
    """Write the adapter as a PEFT folder (new, or into one that is there)."""
    factors = {name: state.weights[name] for name in state.weights if name.startswith(PEFT_PREFIX)}
    write_adapter(folder, tuning.lora, factors, base_model, spec)


def read_tuned(folder: Path, names: tuple[str, ...]) -> Mapping[str, np.ndarray]:
    """Return the tuned tensors of a checkpoint folder by canonical name; they are read when they are asked for."""
    if sliced.is_sliced(folder):
        return sliced.Tensors(folder, "weights")
    found = {}
    if (folder / CONFIG).is_file():
        found |= safetensors_file.read_index(folder / WEIGHTS)
    model = weights_file(folder)
    if model:
        stored = read_index(model)
        found |= {name: stored[name] for name in names if name in stored}
    return lazy.stored(StoredTensors(found), {name: name for name in found})


def base_parts(folder: Path | None) -> lazy.Lazy:
    """Return the tuned base tensors of a checkpoint of parts, read when they are asked for; none of any other path."""
    if folder is None or not sliced.is_sliced(folder):
        return lazy.Lazy({}, {}.__getitem__)
    found = sliced.Tensors(folder, "weights")
    shapes = {name: shape for name, shape in found.shapes.items() if not name.startswith(PEFT_PREFIX)}
    return lazy.Lazy(shapes, found.__getitem__)
