"""Streaming conversion: weights from any source into a MindSpore CKPT or a Hugging Face folder.

One tensor is in memory at a time; nothing appears under the output's name before it is complete.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msft import console
from msft.convert.ckpt import CkptWriter
from msft.convert.direct_file import DirectFile
from msft.convert.dtypes import Cast, byte_count
from msft.convert.open import sidecar
from msft.convert.plan import Output, Reader, pieces, plan
from msft.convert.safetensors_file import SafetensorsWriter
from msft.convert.source import TensorSource
from msft.errors import InputError, RunError
from msft.files import atomic_path, write_json
from msft.models.spec import ModelSpec

SHARD_BYTES = 5 * 10**9


def write_ckpt(
    source: TensorSource,
    spec: ModelSpec,
    path: Path,
    dtype: str | None = None,
    qkv_concat: bool = False,
    verified: Callable[[], None] | None = None,
) -> int:
    """Write a source that `check_against` passed as a CKPT with MindFormers' names; returns its size in bytes.

    `dtype` (float32, float16, bfloat16) casts, None keeps each tensor's dtype. The model's config is put beside it
    as `F.config.json`. An existing file is replaced. `verified` raises InputError when the source turned out to be
    damaged: it is called before the file appears.
    """
    cast = Cast(dtype)
    outputs = plan(spec, source, cast, mindformers=True, qkv_concat=qkv_concat)
    with _writing(path), atomic_path(path) as temporary, DirectFile(temporary) as file:
        writer, reader = CkptWriter(file), Reader(source)
        for output in console.track(outputs, len(outputs), path.name):
            writer.add(output.name, output.info, pieces(output, reader, cast))
        writer.close()
        size = file.tell()
        if verified:
            verified()
    write_json(sidecar(path), _config(spec, outputs))
    _report_overflows(cast)
    return size


def write_hf_folder(
    source: TensorSource,
    spec: ModelSpec,
    folder: Path,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    companions: Mapping[str, bytes | Path] | None = None,
    bar: bool = True,
    verified: Callable[[], None] | None = None,
) -> int:
    """Write a source that `check_against` passed as a new Hugging Face folder; returns its weights' size in bytes.

    Shards of at most `shard_bytes` (a larger tensor has one of its own) under an index, or one model.safetensors;
    config.json; `companions` (name -> content, or a file to copy) such as the tokenizer's files; and a
    generation_config.json if none is among them. `bar` shows a progress bar; `verified` is as in `write_ckpt`.
    Raises InputError when the folder exists and is not empty.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder}: exists; give a new folder's name, or remove it first")
    cast = Cast(dtype)
    outputs = plan(spec, source, cast, mindformers=False)
    config = _config(spec, outputs)
    with _writing(folder), atomic_path(folder) as temporary:
        temporary.mkdir()
        size = _write_shards(temporary, folder.name if bar else "", outputs, source, cast, shard_bytes)
        for name, content in {"generation_config.json": _generation_config(config), **(companions or {})}.items():
            if isinstance(content, Path):
                shutil.copyfile(content, temporary / name)
            else:
                (temporary / name).write_bytes(content)
        write_json(temporary / "config.json", config)
        if verified:
            verified()
        if folder.is_dir():
            folder.rmdir()
    _report_overflows(cast)
    return size


def shards(outputs: Sequence[Output], shard_bytes: int) -> list[list[Output]]:
    """Share outputs out into shards of at most `shard_bytes`, in order; a larger tensor has a shard of its own."""
    result: list[list[Output]] = [[]]
    room = shard_bytes
    for output in outputs:
        size = byte_count(output.info)
        if result[-1] and size > room:
            result.append([])
            room = shard_bytes
        result[-1].append(output)
        room -= size
    return result


def _write_shards(
    folder: Path, title: str, outputs: list[Output], source: TensorSource, cast: Cast, shard_bytes: int
) -> int:
    parts = shards(outputs, shard_bytes)
    weight_map, todo, reader = {}, [], Reader(source)
    for number, part in enumerate(parts, 1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        weight_map |= {output.name: name for output in part}
        todo += [(name, part, output) for output in part]
    with contextlib.ExitStack() as files:
        name, writer = None, None
        for file_name, part, output in console.track(todo, len(todo), title) if title else todo:
            if file_name != name:
                if writer:
                    writer.close()
                files.close()
                file = files.enter_context(DirectFile(folder / file_name))
                name, writer = file_name, SafetensorsWriter(file, {item.name: item.info for item in part})
            writer.add(output.name, pieces(output, reader, cast))
        writer.close()
    size = sum(byte_count(output.info) for output in outputs)
    if len(parts) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return size


def _config(spec: ModelSpec, outputs: list[Output]) -> dict:
    """The model's config with the dtype that most of the written numbers have."""
    sizes: dict[str, int] = {}
    for output in outputs:
        sizes[output.info.dtype] = sizes.get(output.info.dtype, 0) + byte_count(output.info)
    key = "dtype" if "dtype" in spec.hf_config else "torch_dtype"
    return {**spec.hf_config, key: max(sizes, key=sizes.get)}


def _generation_config(config: dict) -> bytes:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    ids = {key: config[key] for key in keys if config.get(key) is not None}
    return (json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n").encode()


def _report_overflows(cast: Cast) -> None:
    if cast.overflows:
        worst = max(cast.overflows, key=cast.overflows.get)
        console.warn(
            f"{sum(cast.overflows.values())} numbers in {len(cast.overflows)} tensors are too large for {cast.dtype} "
            f"and became infinite (most in {worst}: {cast.overflows[worst]})"
        )


@contextlib.contextmanager
def _writing(path: Path):
    """Turn the system's refusals to write (full disk, no permission) into one message."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
