"""What every dataset of tokenised rows offers, and a list of rows that offers it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from msft.errors import InputError


class RowDataset(Protocol):
    """Rows by number, in any order, from any thread; `columns` are the names every row has."""

    columns: tuple[str, ...]

    def __len__(self) -> int:
        """Number of rows."""

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Return one row: column name -> array."""

    def ends(self, fillers: Mapping[str, int | None]) -> Iterator[np.ndarray]:
        """Yield for all rows in order, int32 [n] a piece, how many elements the longest of some columns keeps.

        `fillers` names the columns, each with the value that is cut off at its end (None: nothing is cut).
        """

    def digest(self) -> str:
        """Return 64 hex digits that change when the data does."""


class InMemoryDataset:
    """A list of rows, each a mapping of the same column names to arrays or lists of integers."""

    def __init__(self, rows: Sequence[Mapping[str, Sequence[int]]]):
        self._rows = [{name: np.asarray(values) for name, values in row.items()} for row in rows]
        self.columns = tuple(self._rows[0]) if self._rows else ()
        for index, row in enumerate(self._rows):
            if set(row) != set(self.columns):
                raise InputError(f"row {index}: has columns {sorted(row)}, not {sorted(self.columns)}")

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Return the row's own arrays, not copies."""
        return self._rows[index]

    def ends(self, fillers: Mapping[str, int | None]) -> Iterator[np.ndarray]:
        """Yield the rows' ends (RowDataset.ends) in one piece."""
        ends = [max(kept(row[name], filler) for name, filler in fillers.items()) for row in self._rows]
        yield np.array(ends, np.int32)

    def digest(self) -> str:
        """Return the SHA-256 (64 hex digits) of all names, dtypes, shapes and bytes."""
        digest = hashlib.sha256()
        for row in self._rows:
            for name in self.columns:
                values = np.ascontiguousarray(row[name])
                digest.update(f"{name} {values.dtype.str} {values.shape} ".encode())
                digest.update(values.tobytes())
        return digest.hexdigest()


def kept(values: np.ndarray, filler: int | None) -> int:
    """Return how many of the values are left when `filler` is cut off at their end."""
    if filler is None:
        return len(values)
    others = np.flatnonzero(values != filler)
    return int(others[-1]) + 1 if len(others) else 0
