"""MindFormers' folders of distributed checkpoints: `rank_0/*.ckpt, rank_1/*.ckpt, ...`, each with its rank's slices."""

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from msft import console
from msft.convert import ckpt
from msft.convert.ckpt_names import is_concatenated, is_trainer_state
from msft.convert.joined import Joined, Piece
from msft.convert.layouts import Layout
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored
from msft.convert.strategy import Strategy, read_strategy
from msft.errors import InputError, did_you_mean

META = "meta.json"
KEY = "src_strategy_path_or_dir"
MAX_PROBLEMS = 20
_RANK = re.compile(r"rank_(\d{1,7})")
_STEP = re.compile(r"-(\d+_\d+)\.ckpt$")


def read_index(ckpts: dict[int, Path], strategy: Path, verify: bool = True) -> dict[str, Stored | Joined]:
    """Return the whole tensors of a distributed checkpoint by its own names; no slice is read yet.

    `ckpts` are the ranks' files, `strategy` is a strategy file or a folder of them, `verify` is as in `ckpt`. Of equal
    slices the lowest rank's is taken. A tensor that the strategy does not name is taken whole, which is said; the
    optimizer's state is not joined. Raises InputError, also for slices that are missing or do not fit together.
    """
    cut = read_strategy(strategy)
    covered = cut.stages * cut.ranks
    if max(ckpts) >= covered:
        raise InputError(
            f"{ckpts[max(ckpts)].parent}: is there, but {strategy} describes {covered} ranks ({cut.stages} pipeline "
            f"stages of {cut.ranks}): with several stages, name the folder of every rank's strategy file"
        )
    ranks = {rank: ckpt.read_index(file, verify).tensors for rank, file in ckpts.items()}
    return _join(min(ckpts.items())[1].parent.parent, cut, ranks)


def files(folder: Path) -> dict[int, Path]:
    """Return each rank's CKPT, all of one step: the one that the lowest rank's meta.json calls the last, or its newest.

    Raises InputError when the folder has no `rank_K` with CKPTs, or a rank has none of that step.
    """
    folders = ranks_in(folder)
    if not folders:
        raise InputError(f"{folder}: is no folder of rank_0, rank_1, ... with CKPTs, so {KEY} does not go with it")
    first = min(folders)
    chosen = last_file(folders[first])
    return {rank: _same_step(chosen, first, place, rank) for rank, place in sorted(folders.items())}


def lowest_file(folder: Path) -> Path:
    """Return the lowest rank's CKPT, beside which a model's small files are looked for; raises InputError for none."""
    return min(files(folder).items())[1]


def ranks_in(folder: Path) -> dict[int, Path]:
    """Return the folders `rank_K` with CKPTs, by rank."""
    found = {place: _RANK.fullmatch(place.name) for place in folder.glob("rank_*")}
    return {int(match[1]): place for place, match in found.items() if match and any(place.glob("*.ckpt"))}


def last_file(folder: Path) -> Path:
    """Return the CKPT that a rank's meta.json calls the last, or else its newest; raises InputError for none."""
    meta = folder / META
    if meta.is_file():
        named = _named(meta)
        if named and named == Path(named).name and (folder / named).is_file():
            return folder / named
        console.warn(f"{meta}: last_ckpt_file names no file here, so the newest is taken")
    found = sorted(folder.glob("*.ckpt"), key=lambda file: (file.stat().st_mtime, file.name))
    if not found:
        raise InputError(f"load_checkpoint: {folder} holds no CKPT")
    return found[-1]


@contextlib.contextmanager
def slices_explained(path: Path | None, advice: str) -> Iterator[None]:
    """When what is read of one rank alone does not fit, say that it may be a slice, and what joins slices (`advice`).

    `path` is what is read: a file or folder of a rank, the folder around, or anything else, about which nothing is
    added (None: a strategy is there).
    """
    try:
        yield
    except InputError as error:
        around = (path, *path.absolute().parents[:2]) if path else ()
        folder = next((place for place in around if len(ranks_in(place)) > 1), None)
        if folder is None:
            raise
        place = folder.parent / "strategy"
        hint = f"; {place} looks like it" if place.is_dir() else ""
        raise InputError(
            f"{folder}: holds files of {len(ranks_in(folder))} ranks, and one rank's alone do not fit: if they are "
            f"slices, {advice}: the strategy file that MindFormers saved beside them (ckpt_strategy_rank_0.ckpt, or "
            f"with pipeline stages the folder of all{hint})",
            *error.problems,
        ) from error


class _Missing(Exception):
    """No rank that is there has the slice that `rank` held."""

    def __init__(self, rank: int):
        super().__init__(rank)
        self.rank = rank


def _same_step(chosen: Path, first: int, place: Path, rank: int) -> Path:
    wanted = place / chosen.name.replace(f"rank_{first}", f"rank_{rank}")
    if wanted.is_file():
        return wanted
    found = sorted(place.glob("*.ckpt"))
    if len(found) == 1 and _step(found[0]) == _step(chosen):
        return found[0]
    names = ", ".join(file.name for file in found[:3])
    raise InputError(f"{place}: holds no {wanted.name}, which goes with {chosen} ({names} may be of another step)")


def _step(file: Path) -> str:
    match = _STEP.search(file.name)
    return match[1] if match else ""


def _named(meta: Path) -> str:
    try:
        name = json.loads(meta.read_text(encoding="utf-8"))["last_ckpt_file"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return name if isinstance(name, str) else ""


def _join(folder: Path, strategy: Strategy, ranks: dict[int, dict[str, Stored]]) -> dict[str, Stored | Joined]:
    holders: dict[str, dict[int, Stored]] = {}
    for rank, tensors in ranks.items():
        for name, entry in tensors.items():
            holders.setdefault(name, {})[rank] = entry
    result: dict[str, Stored | Joined] = {}
    missing: dict[int, list[str]] = {}
    problems, unnamed, known = [], [], 0
    for name, held in holders.items():
        first = next(iter(held.values()))
        if is_trainer_state(name, first):
            result[name] = first
            continue
        stages = strategy.layouts.get(name)
        known += stages is not None
        try:
            if stages is None:
                result[name] = _alike(name, held.values())
                unnamed.append(name)
            else:
                stage = min(stages)
                result[name] = _joined(name, stage * strategy.ranks, strategy.ranks, stages[stage], held)
        except _Missing as error:
            missing.setdefault(error.rank, []).append(name)
        except InputError as error:
            problems += error.problems
    problems += [_lacking(folder, rank, names, ranks) for rank, names in sorted(missing.items())]
    if unnamed and not known:
        hint = did_you_mean(unnamed[0], strategy.layouts)
        raise InputError(f"{strategy.path}: names none of the tensors in {folder} (first: {unnamed[0]!r}{hint})")
    if problems:
        raise InputError(*problems[:MAX_PROBLEMS])
    if unnamed:
        console.note(
            f"{strategy.path}: does not name {len(unnamed)} tensors of {folder} (first: {unnamed[0]!r}), which are "
            "taken to be whole on every rank"
        )
    return result


def _lacking(folder: Path, rank: int, names: list[str], ranks: dict[int, dict[str, Stored]]) -> str:
    what = f"slices of {len(names)} tensors (first: {names[0]!r}) that no other rank has"
    if rank in ranks:
        return f"{folder / f'rank_{rank}'}: its file lacks {what}"
    return f"{folder}: has no rank_{rank} with a CKPT, which held {what}"


def _joined(name: str, base: int, count: int, layout: Layout, held: dict[int, Stored]) -> Stored | Joined:
    """Join the slices that the `count` ranks of the stage that begins with rank `base` hold."""
    slices: dict[tuple[int, ...], Stored] = {}
    for rank, entry in held.items():
        if base <= rank < base + count:
            slices.setdefault(layout.place(rank - base), entry)
    counts = layout.counts()
    if len(slices) < math.prod(counts):
        raise _Missing(base + next(rank for rank in range(count) if layout.place(rank) not in slices))
    first = _alike(name, slices.values())
    if len(slices) == 1:
        return first
    if len(first.info.shape) != len(counts):
        raise InputError(
            f"{first.file}: tensor {name!r} has shape {list(first.info.shape)}, the strategy cuts {len(counts)} axes"
        )
    # The optimizer's shards are rows in their order; model_parallel cuts each of the matrices by heads or columns.
    if is_concatenated(name) and counts[0] > layout.shards:
        raise InputError(
            f"{first.file}: tensor {name!r} (qkv_concat) is cut along its rows, in whose order MindFormers then keeps "
            "each rank's part of every matrix together, which is not undone here: save it with qkv_concat False"
        )
    sizes = first.info.shape
    whole = TensorInfo(tuple(size * parts for size, parts in zip(sizes, counts, strict=True)), first.info.dtype)
    pieces = (
        Piece(entry, tuple(number * size for number, size in zip(place, sizes, strict=True)))
        for place, entry in slices.items()
    )
    return Joined(whole, tuple(pieces))


def _alike(name: str, entries: Iterable[Stored]) -> Stored:
    """The first of the entries, all of one shape and dtype."""
    first, *others = entries
    for other in others:
        if other.info != first.info:
            raise InputError(
                f"{other.file}: tensor {name!r} is {other.info.dtype} {list(other.info.shape)}, "
                f"but {first.info.dtype} {list(first.info.shape)} in {first.file}"
            )
    return first
