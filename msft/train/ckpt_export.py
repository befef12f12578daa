"""A checkpoint's weights as MindFormers' CKPT: `output_dir/checkpoint/rank_0/<prefix>_rank_0-<epoch>_<step>.ckpt`.

Epochs and steps within them count from 1, as MindSpore's do. `meta.json` beside them names the last one.
"""

import re
from pathlib import Path

from msft.backend.contract import EngineState
from msft.convert.ckpt import CkptWriter
from msft.convert.dtypes import Cast
from msft.convert.plan import Reader, pieces, plan
from msft.convert.source import TensorInfo, TensorSource
from msft.files import atomic_path, remove, write_json
from msft.models.adapters import PEFT_PREFIX, peft_to_mindformers
from msft.models.families import family
from msft.models.spec import ModelSpec
from msft.train.weights import Overlay

FOLDER, RANK, META = "checkpoint", "rank_0", "meta.json"


def write(
    output_dir: Path, prefix: str, position: tuple[int, int], spec: ModelSpec, base: TensorSource, state: EngineState
) -> Path:
    """Write all weights of a step; returns the file.

    `position` is (epoch, step within it), both from 1. Tuned tensors are float32, base tensors keep their dtype,
    adapters stand beside them (`mindpet_delta_lora_a`, `_b`). One tensor of the base is in memory at a time.
    """
    folder, (epoch, step) = output_dir / FOLDER / RANK, position
    path = folder / f"{prefix}_{RANK}-{epoch}_{step}.ckpt"
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        _write_tensors(CkptWriter(file), spec, base, state)
    # Where readers that know no recipe find the sizes.
    write_json(folder.parent / "config.json", spec.hf_config)
    write_json(folder / META, {"last_epoch": epoch, "last_step": step, "last_ckpt_file": path.name})
    return path


def _write_tensors(writer: CkptWriter, spec: ModelSpec, base: TensorSource, state: EngineState) -> None:
    factors = {name: array for name, array in state.weights.items() if name.startswith(PEFT_PREFIX)}
    tuned = {name: array for name, array in state.weights.items() if name not in factors}
    source, keep = Overlay(base, tuned), Cast(None)
    for output in plan(spec, source, keep, mindformers=True):
        writer.add(output.name, output.info, pieces(output, Reader(source), keep))
    for name, array in factors.items():
        info = TensorInfo(array.shape, array.dtype.name)
        writer.add(peft_to_mindformers(name, family(spec.family)), info, keep.pieces(name, array))
    writer.close()


def prune(output_dir: Path, prefix: str, keep: int, newest: tuple[int, int]) -> None:
    """Keep the `keep` newest files up to position `newest`, and remove older ones."""
    pattern = re.compile(re.escape(f"{prefix}_{RANK}-") + r"(\d+)_(\d+)\.ckpt")
    found = {path: pattern.fullmatch(path.name) for path in (output_dir / FOLDER / RANK).glob("*.ckpt")}
    positions = {path: (int(match[1]), int(match[2])) for path, match in found.items() if match}
    older = sorted((path for path in positions if positions[path] <= newest), key=positions.get, reverse=True)
    for path in older[keep:]:
        remove(path)
