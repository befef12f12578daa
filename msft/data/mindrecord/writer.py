"""Writing MindRecord: a set of shards with their `.db` files, visible only when complete."""

import contextlib
import os
import re
import sqlite3
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from msft import files
from msft.data.mindrecord.dataset import inspect
from msft.data.mindrecord.header import DTYPES
from msft.data.mindrecord.shard_writer import Schema, ShardWriter
from msft.errors import InputError, RunError

_NAME = re.compile(r"[A-Za-z0-9_-]+")
MAX_SHARDS = 1000


class MindRecordWriter:
    """Write rows of 1-D arrays to `path` and `path`.db, or to shards `path`0 ... N-1 with a `.db` each.

    `columns` maps names to int32, int64, float32 or float64. Rows go to the shards in turn. Used as a context
    manager: rows stream to hidden files beside the target, and a clean exit puts these in place of any older ones.
    After an error nothing is left and older files are untouched.

    Reading is never wrong in between: the old index goes first, so that a reader finds the data without its `.db`
    (MindSpore refuses it, this package's reader walks the pages), but never data with another file's index.
    The layout (16 MiB header, 32 MiB pages) is MindSpore's default, so that files can be listed with FileWriter's;
    unused space is a hole and takes no disk. Raises InputError for a path or row that cannot be written, RunError
    when the disk fails.
    """

    def __init__(self, path: str | os.PathLike, columns: Mapping[str, str], shards: int = 1, description: str = ""):
        self.rows = 0
        self._columns = {name: np.dtype(_checked_type(name, columns[name])) for name in sorted(columns)}
        if not columns:
            raise InputError(f"{path}: a MindRecord file needs at least one column")
        if not 1 <= shards <= MAX_SHARDS:
            raise InputError(f"{path}: {shards} shards; MindRecord allows 1 to {MAX_SHARDS}")
        self._path = Path(path)
        self._targets = shard_paths(self._path, shards)
        self._schema = Schema({name: columns[name] for name in self._columns}, description)
        self._shards: list[ShardWriter] = []

    def __enter__(self) -> "MindRecordWriter":
        folder, part = self._path.parent, uuid.uuid4().hex[:8]
        try:
            with self._disk():
                folder.mkdir(parents=True, exist_ok=True)
                self._refuse_other_sets()
                for target in self._targets:
                    hidden = folder / f".{target.name}.{part}.part"
                    self._shards.append(ShardWriter(hidden, target.name, self._schema))
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, row: Mapping[str, np.ndarray]) -> None:
        """Append a row: a 1-D array for every column, of the column's dtype or one that casts to it safely."""
        if row.keys() != self._columns.keys():
            raise InputError(f"row {self.rows}: has columns {sorted(row)}, not {list(self._columns)}")
        arrays = [self._array(name, row[name]) for name in self._columns]
        with self._disk():
            self._shards[self.rows % len(self._shards)].write(arrays)
        self.rows += 1

    def write_blobs(self, blobs: Sequence[bytes], nbytes: int) -> None:
        """Append rows as `codec` writes them, of arrays of `nbytes` bytes a row, the columns in order of their names.

        For rows that other processes have encoded: nothing is checked.
        """
        with self._disk():
            for blob in blobs:
                self._shards[self.rows % len(self._shards)].append(blob, nbytes)
                self.rows += 1

    def _array(self, name: str, values: np.ndarray) -> np.ndarray:
        values, dtype = np.asarray(values), self._columns[name]
        if values.ndim != 1:
            raise InputError(f"row {self.rows}: column {name!r} has shape {values.shape}, not one dimension")
        if not len(values):
            # MindDataset returns uninitialised memory for an empty array.
            raise InputError(f"row {self.rows}: column {name!r} is empty, which MindSpore cannot read")
        if values.dtype == dtype:
            return values
        cast = values.astype(dtype) if np.can_cast(values.dtype, dtype, "same_kind") else None
        if cast is None or (dtype.kind == "i" and not np.array_equal(cast, values)):
            raise InputError(f"row {self.rows}: column {name!r} of dtype {values.dtype} does not fit {dtype}")
        return cast

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                with self._disk():
                    self._publish()
        finally:
            self._discard()

    def _publish(self) -> None:
        if not self.rows:
            raise InputError(f"{self._path}: no row was written, and MindRecord cannot hold none")
        saved = sum(shard.saved for shard in self._shards)
        names = [target.name for target in self._targets]
        for number, shard in enumerate(self._shards):
            shard.finish(names, number, saved)
            files.sync(shard.path)
            files.sync(shard.database)
        replaced = [_database(target) for target in self._targets]
        if len(self._targets) > 1:
            replaced += self._targets
        for old in replaced:
            files.remove(old)
        for shard, target in zip(self._shards, self._targets, strict=True):
            os.replace(shard.path, target)
        for shard, target in zip(self._shards, self._targets, strict=True):
            os.replace(shard.database, _database(target))
        files.sync(self._path.parent)

    @contextlib.contextmanager
    def _disk(self):
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"{self._path}: {getattr(error, 'strerror', None) or error}") from None

    def _discard(self) -> None:
        for shard in self._shards:
            with contextlib.suppress(OSError, sqlite3.Error):
                shard.close()
            files.remove(shard.path)
            files.remove(shard.database)

    def _refuse_other_sets(self) -> None:
        """Shards of an older set with another number of them would be taken for part of the new one."""
        own = [target.name for target in self._targets]
        pattern = re.compile(re.escape(self._path.name) + r"\d*")
        for file in sorted(self._path.parent.iterdir()):
            if pattern.fullmatch(file.name) and file.name not in own and _belongs(file, self._path.name):
                raise InputError(f"{file}: left from a set with another number of shards; remove it first")


def shard_paths(path: Path, shards: int) -> list[Path]:
    """Return a set's file names as MindSpore gives them: the path itself, or numbered with equal width."""
    if shards == 1:
        return [path]
    width = len(str(shards - 1))
    return [path.with_name(f"{path.name}{number:0{width}}") for number in range(shards)]


def _belongs(file: Path, name: str) -> bool:
    try:
        names = inspect(file).header.shard_names
    except InputError:
        return False
    return file.name == name or len(names) > 1


def _database(path: Path) -> Path:
    return path.with_name(path.name + ".db")


def _checked_type(name: str, kind: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(f"column name {name!r}: MindRecord allows letters, digits, '_' and '-'")
    if kind not in DTYPES:
        raise InputError(f"column {name!r}: type {kind!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[kind]
