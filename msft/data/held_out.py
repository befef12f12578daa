"""Rows that are taken out of training to be evaluated on."""

import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np

from msft.data.dataset import RowDataset
from msft.errors import InputError


class Subset:
    """Some rows of a dataset, `rows` (int64 [n]) by their numbers in it."""

    def __init__(self, dataset: RowDataset, rows: np.ndarray):
        self._dataset, self._rows, self.columns = dataset, rows, dataset.columns

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Return one of the rows."""
        return self._dataset.row(int(self._rows[index]))

    def ends(self, fillers: Mapping[str, int | None]) -> Iterator[np.ndarray]:
        """Yield the rows' ends (RowDataset.ends) in one piece."""
        yield np.concatenate([*self._dataset.ends(fillers)])[self._rows]

    def digest(self) -> str:
        """Return the digest of the whole dataset's rows and of the numbers."""
        return hashlib.sha256(self._dataset.digest().encode() + self._rows.astype("<i8").tobytes()).hexdigest()


def split(dataset: RowDataset, held_out: float, seed: int, where: str) -> tuple[Subset, Subset]:
    """Return the rows to train on and those to evaluate on, as the datasets library's train_test_split deals them.

    `held_out` below 1 is a share, rounded up, else a number. Raises InputError naming `where` when either is empty.
    """
    count = math.ceil(len(dataset) * held_out) if held_out < 1 else int(held_out)
    if not 0 < count < len(dataset):
        raise InputError(f"{where}: {held_out:g} of {len(dataset)} rows leaves nothing to train on or to evaluate")
    order = np.random.default_rng(seed).permutation(len(dataset))
    return Subset(dataset, order[count:]), Subset(dataset, order[:count])
