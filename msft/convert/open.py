"""Opening weights and configs whatever their format, always under Hugging Face's names."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msft.convert import (
    ckpt,
    ckpt_names,
    file_names,
    gguf_file,
    hf_folder,
    laid_out,
    meta,
    rank_folder,
    safetensors_file,
    torch_file,
)
from msft.convert.detect import Kind, detect, is_companion
from msft.convert.joined import Joined, JoinedTensors
from msft.convert.source import TensorSource
from msft.convert.stored import Stored, StoredTensors, readable
from msft.errors import InputError
from msft.models.families import spec_from_hf
from msft.models.spec import ModelSpec

# Verified before anybody notices, and before a bar shows the progress of what will be thrown away.
SMALL_BYTES = 64 * 2**20


def open_weights(
    path: str | os.PathLike, spec: ModelSpec | None = None, verify: bool = True, strategy: Path | None = None
) -> TensorSource:
    """Open a model's weights under Hugging Face's names.

    `path` is an HF folder (safetensors or `.bin`, one file or shards), a file in it, a MindSpore CKPT, a folder with
    one CKPT, Meta's folder, or a GGUF file. `spec` is needed only to split a CKPT's `w_qkv`; without it the
    config beside the file is used. Raises InputError naming file and tensor. Nothing but headers is read, except
    that the CRC of a CKPT (unless `verify` is False, see `verifying`) or a file of torch.save, where present, is
    verified. With `strategy` (MindSpore's strategy file or a folder of them) `path` is the parent of `rank_0`,
    `rank_1`, ..., whose slices are joined.
    """
    with readable(path):
        if strategy is not None:
            files = rank_folder.files(Path(path))
            entries = rank_folder.read_index(files, strategy, verify)
            return _source(entries, spec, min(files.items())[1], JoinedTensors)
        kind, file = detect(path)
        if kind is Kind.META:
            return meta.open_folder(file)
        if kind is Kind.GGUF:
            return gguf_file.open_file(file)
        return _source(_read_index(kind, file, verify), spec, file, StoredTensors)


@contextlib.contextmanager
def verifying(path: str | os.PathLike, strategy: Path | None = None):
    """Verify the CRC of the weights at a path, if they are CKPTs: large ones in a thread while the body reads them.

    Yields a function that waits for the end and raises InputError for damage: call it before a result is shown to
    anybody. Damage is raised in place of what the body raised because of it. `strategy` is as in `open_weights`.
    """
    with readable(path):
        files = list(rank_folder.files(Path(path)).values()) if strategy else _ckpts(path)
        size = sum(file.stat().st_size for file in files)
    with ThreadPoolExecutor(1) as thread:
        verified = thread.submit(_verify, files)
        if size < SMALL_BYTES:
            verified.result()
        try:
            yield verified.result
        finally:
            verified.result()


def read_hf_config(path: str | os.PathLike) -> dict:
    """Return the Hugging Face config of the model at a path (anything that `open_weights` takes, or a config.json).

    Meta's params.json and GGUF's metadata are translated; a CKPT needs a config.json beside it.
    Raises InputError when there is none.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".json" and not is_companion(path):
        return hf_folder.read_json(path)
    folder = path.parent if is_companion(path) else path
    if (folder / "config.json").is_file():
        return hf_folder.read_json(folder / "config.json")
    kind, file = detect(path)
    if kind is Kind.META:
        return meta.hf_config(file)
    if kind is Kind.GGUF:
        return gguf_file.hf_config(file)
    config = find_config(file)
    if config is None:
        raise InputError(f"{file}: there is no {sidecar(file).name} or config.json beside it; its sizes are unknown")
    return hf_folder.read_json(config)


def read_spec(path: str | os.PathLike) -> ModelSpec:
    """Return the ModelSpec of the model at a path; raises InputError like `read_hf_config`."""
    return spec_from_hf(read_hf_config(path), str(path))


def sidecar(file: Path) -> Path:
    """Return where a CKPT's own config lies: `F.config.json` beside `F.ckpt`, since a CKPT cannot hold one."""
    return file.with_name(f"{file.stem}.config.json")


def find_config(file: Path) -> Path | None:
    """Return a weight file's config: its sidecar, or the config.json beside it or beside its `rank_0` folder."""
    places = [file.parent, file.parent.parent] if file.parent.name.startswith("rank_") else [file.parent]
    return next(
        (config for config in (sidecar(file), *(place / "config.json" for place in places)) if config.is_file()), None
    )


def _read_index(kind: Kind, file: Path, verify: bool) -> dict[str, Stored]:
    if kind is Kind.CKPT:
        return ckpt.read_index(file, verify).tensors
    if kind is Kind.HF:
        return hf_folder.read_index(file)
    return (torch_file if kind is Kind.TORCH else safetensors_file).read_index(file)


def _ckpts(path: str | os.PathLike) -> list[Path]:
    kind, file = detect(path)
    return [file] if kind is Kind.CKPT else []


def _verify(files: list[Path]) -> None:
    for file in files:
        with readable(file):
            ckpt.verify(file)


def _source(stored: dict[str, Stored | Joined], spec: ModelSpec | None, file: Path, kind: type) -> TensorSource:
    """The model's tensors under canonical names; `kind` reads those that are in the file as they are."""
    config = find_config(file)
    if spec is None and config is not None:
        spec = spec_from_hf(hf_folder.read_json(config), str(config))
    if spec is not None and laid_out.is_meant(stored, spec):
        return laid_out.LaidOutTensors(ckpt_names.of_model(stored, str(file)), spec)
    if ckpt_names.are_mindformers(stored):
        entries = ckpt_names.canonical(stored, spec, str(file))
    else:
        # A CKPT of a family without names of MindFormers' holds its state and adapters all the same.
        stored = ckpt_names.of_model(stored, str(file))
        entries = stored if spec is None else file_names.canonical(stored, spec)
    is_joined = any(isinstance(entry, Joined) for entry in entries.values())
    return (JoinedTensors if is_joined else kind)(entries)
