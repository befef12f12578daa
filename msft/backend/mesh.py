"""Which ranks work together: those that hold slices of one model, and those that hold the same slice."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mesh:
    """`data` x `tensor` ranks, numbered as MindFormers and Megatron do: those of one model one after another.

    The ranks of one model (`tensor`) see the same rows, each with its slice of every matrix; the ranks with the same
    slice (`data`) see different rows.
    """

    data: int = 1
    tensor: int = 1
    rank: int = 0

    @property
    def data_rank(self) -> int:
        """This rank's share of the rows, from 0."""
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        """This rank's slice of the matrices, from 0."""
        return self.rank % self.tensor

    def shards(self, strategy: str) -> bool:
        """Whether a strategy leaves each rank with a part of what is tuned: one rank has nobody to share it with."""
        return strategy != "ddp" and self.data > 1

    @property
    def tensor_groups(self) -> list[list[int]]:
        """The ranks of each model."""
        return [
            [first + place for place in range(self.tensor)] for first in range(0, self.data * self.tensor, self.tensor)
        ]

    @property
    def data_groups(self) -> list[list[int]]:
        """The ranks of each slice."""
        return [list(range(place, self.data * self.tensor, self.tensor)) for place in range(self.tensor)]

    def rows(self, count: int) -> slice:
        """Return this rank's share of the rows of a tensor, by its place in `data`; there may be none."""
        return slice(count * self.data_rank // self.data, count * (self.data_rank + 1) // self.data)

    def sum_over_data(self, gathered: np.ndarray) -> np.ndarray:
        """Sum numbers of all ranks [ranks, n] over `data`; of the equal ones of a model the largest counts.

        So that a signal to one of them is seen too.
        """
        return gathered.reshape(self.data, self.tensor, -1).max(axis=1).sum(axis=0)

    def sum_over_tensor(self, gathered: np.ndarray) -> np.ndarray:
        """Sum numbers of all ranks [ranks, n] over the ranks of this one's model."""
        return gathered.reshape(self.data, self.tensor, -1)[self.data_rank].sum(axis=0)
