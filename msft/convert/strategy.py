"""MindSpore's strategy files, which say how each parameter of a distributed model is cut over its ranks.

A file is a protobuf message of node_strategy.proto: ParallelStrategyMap{uint32 current_stage=1 (a counter of saves);
repeated ParallelStrategyItem=2; repeated ParallelLayoutItem=3}, with ParallelStrategyItem{node_name=1;
ParallelStrategys{uint32 stage=1; ...}=2} and ParallelLayoutItem{param_name=1; ParallelLayouts=2}. Each rank writes the
parameters of its own pipeline stage; in a merged file the stage stands before the name, as in `1-model.norm.weight`.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from msft.convert.layouts import Layout, from_mindspore
from msft.convert.protobuf import Message
from msft.convert.stored import readable
from msft.errors import InputError

WHAT = "MindSpore strategy file"
MAX_TEXT = 1024
_MERGED = re.compile(r"(\d{1,6})-(.+)")


class Strategy(NamedTuple):
    """How a model is cut: `layouts` by parameter and pipeline stage, over `stages` of `ranks` ranks each."""

    path: Path
    layouts: dict[str, dict[int, Layout]]
    stages: int
    ranks: int


def read_strategy(path: str | os.PathLike) -> Strategy:
    """Return what a strategy file says, or the files of a folder (one a rank, or one a stage, or a merged one).

    Raises InputError naming the file: for damage, for files that disagree, and when a pipeline stage is missing.
    """
    path, layouts = Path(path), {}
    with readable(path):
        for file in _different(path):
            for stage, name, layout in _read(file):
                known = layouts.setdefault(name, {}).setdefault(stage, layout)
                if known != layout:
                    raise InputError(f"{file}: {name!r} is cut in another way than in another strategy file beside it")
    if not layouts:
        raise InputError(f"{path}: holds no parameter's layout")
    # A parameter that is on one rank, or whole on all, may have the matrix [] or [1].
    sizes = {layout.ranks() for stages in layouts.values() for layout in stages.values()}
    if len(sizes - {1}) > 1:
        raise InputError(f"{path}: parameters are cut over different numbers of ranks ({sorted(sizes)})")
    stages = {stage for found in layouts.values() for stage in found}
    missing = next((stage for stage in range(max(stages)) if stage not in stages), None)
    if missing is not None:
        raise InputError(
            f"{path}: has pipeline stage {max(stages)}, but not stage {missing}: name the folder with every rank's "
            "strategy file, or the merged one"
        )
    return Strategy(path, layouts, len(stages), max(sizes))


def _different(path: Path) -> Iterator[Path]:
    """The strategy files at a path, those with equal content once: the ranks of a stage write the same."""
    if path.is_dir():
        files = sorted(path.glob("*.ckpt"))
        if not files:
            raise InputError(f"{path}: holds no strategy file (*.ckpt)")
    elif path.suffix == ".json":
        raise InputError(f"{path}: strategies saved as JSON are not read, save them as .ckpt")
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"{path}: does not exist")
    seen = set()
    for name in files:
        with open(name, "rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        if content not in seen:
            seen.add(content)
            yield name


def _read(path: Path) -> Iterator[tuple[int, str, Layout]]:
    stages, layouts = set(), []
    with open(path, "rb") as file:
        message = Message(path, file, 0, path.stat().st_size, WHAT)
        for number, start, end in message.fields(varints=(1,)):
            if number == 1:
                _single(message, start, end)
            elif number == 2:
                stages.add(_stage(message.inside(start, end)))
            elif number == 3:
                layouts.append(_item(message.inside(start, end)))
            else:
                raise message.damaged(start)
    for name, layout in layouts:
        merged = _MERGED.fullmatch(name)
        if not merged and len(stages) > 1:
            raise InputError(f"{path}: holds pipeline stages {sorted(stages)}, but {name!r} does not say which is its")
        yield (int(merged[1]), merged[2], layout) if merged else (next(iter(stages), 0), name, layout)


def _stage(item: Message) -> int:
    for number, start, end in item.fields():
        if number == 2:
            strategies = item.inside(start, end)
            for inner, first, last in strategies.fields(varints=(1,)):
                if inner == 1:
                    return _single(strategies, first, last)
    raise item.damaged(item.start)


def _item(item: Message) -> tuple[str, Layout]:
    name, layout = None, None
    for number, start, end in item.fields():
        if number == 1:
            name = item.text(start, end, MAX_TEXT)
        elif number == 2:
            layout = item.inside(start, end)
        else:
            raise item.damaged(start)
    if name is None or layout is None:
        raise item.damaged(item.start)
    return name, _layout(name, layout)


def _layout(name: str, message: Message) -> Layout:
    lists: dict[int, list[list[int]]] = {1: [], 2: [], 3: [], 4: []}
    single: dict[int, int] = {}
    for number, start, end in message.fields(varints=(5, 6, 7)):
        if number in lists:
            lists[number].append(_numbers(message.inside(start, end)))
        elif number in (5, 6, 7):
            single[number] = _single(message, start, end)
        else:
            raise message.damaged(start)
    devices, maps = lists[1], lists[2]
    if len(devices) != 1 or not maps or len(single) != 3:
        raise message.damaged(message.start)
    where = f"{message.path}: parameter {name[:200]!r}"
    if any(lists[3]) or single[5]:
        raise InputError(f"{where}: is cut into uneven parts or by fields, which is not supported")
    # An axis that several dimensions cut has a message of its own, and so has then every other axis.
    axes = [axis for axis in maps if axis] if len(maps) > 1 else [[dim] for dim in maps[0]]
    try:
        return from_mindspore(devices[0], axes, step=single[6], size=single[7])
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _numbers(message: Message) -> list[int]:
    numbers = []
    for number, start, end in message.fields(varints=(1,)):
        if number != 1 or len(numbers) > 64:
            raise message.damaged(start)
        numbers += map(_signed, message.varints(start, end))
    return numbers


def _single(message: Message, start: int, end: int) -> int:
    numbers = message.varints(start, end)
    if len(numbers) != 1:
        raise message.damaged(start)
    return _signed(numbers[0])


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
