"""Which rows a training step takes: arithmetic on (seed, epoch, step), so that any step can be resumed from."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

FILL = -1


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, rows: int, shuffle: bool) -> np.ndarray:
    """Return the row numbers of an epoch in the order they are taken, int64 [rows], not writable.

    Shuffled rows are sorted by 64-bit keys drawn from PCG64 seeded with (seed, epoch). Unlike
    Generator.permutation, numpy promises these bits for every version, so the order outlives an upgrade.
    """
    if shuffle:
        keys = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(rows)
        order = np.argsort(keys, kind="stable")
    else:
        order = np.arange(rows)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class Plan:
    """How `epochs` passes over `rows` rows are cut into steps of `global_batch` rows.

    Step s of an epoch takes rows s * global_batch ... of the epoch's order. The remainder of an epoch is left out,
    or, without `drop_remainder`, becomes a last step filled up with FILL.
    """

    rows: int
    global_batch: int
    epochs: int
    seed: int
    shuffle: bool
    drop_remainder: bool

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""
        return self.rows // self.global_batch if self.drop_remainder else -(-self.rows // self.global_batch)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps in the whole run."""
        return self.steps_per_epoch * self.epochs

    @property
    def dropped_rows(self) -> int:
        """Rows of the data that an epoch leaves out."""
        return self.rows % self.global_batch if self.drop_remainder else 0

    @property
    def fill_rows(self) -> int:
        """Wholly masked rows that an epoch's last step is filled up with."""
        return 0 if self.drop_remainder else -self.rows % self.global_batch

    def position(self, step: int) -> tuple[int, int]:
        """Return (epoch, step within the epoch) of a step of the run, both counted from 0."""
        return divmod(step, self.steps_per_epoch)

    def rows_of(self, step: int) -> np.ndarray:
        """Return the row numbers of a step of the run, int64 [global_batch], FILL where there is no row."""
        epoch, step = self.position(step)
        order = epoch_order(self.seed, epoch, self.rows, self.shuffle)
        taken = order[step * self.global_batch : (step + 1) * self.global_batch]
        return np.pad(taken, (0, self.global_batch - len(taken)), constant_values=FILL)
