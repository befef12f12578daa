"""Which rows a training step takes: arithmetic on (seed, epoch, step), so that any step can be resumed from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

FILL = -1
WINDOW_STEPS = 50


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, rows: int, shuffle: bool) -> np.ndarray:
    """Return the row numbers of an epoch in the order they are taken, int64 [rows], not writable.

    Shuffled rows are sorted by 64-bit keys drawn from PCG64 seeded with (seed, epoch). Unlike
    Generator.permutation, numpy promises these bits for every version, so the order outlives an upgrade.
    """
    order = np.argsort(_bits(seed, epoch).random_raw(rows), kind="stable") if shuffle else np.arange(rows)
    order.flags.writeable = False
    return order


def grouped_order(seed: int, epoch: int, lengths: np.ndarray, global_batch: int) -> np.ndarray:
    """Return the row numbers of an epoch, int64 [rows], such that the rows of a step are of similar `lengths`.

    As transformers' LengthGroupedSampler: the shuffled order is cut into windows of WINDOW_STEPS steps, the rows of a
    window are sorted from the longest to the shortest, then whole steps are shuffled. The rows that fill no step are
    those of the shuffled order, sorted too, and stay at the end.
    """
    order = epoch_order(seed, epoch, len(lengths), True)
    steps, window = len(order) // global_batch, WINDOW_STEPS * global_batch
    windows = [
        *np.split(order[: steps * global_batch], range(window, steps * global_batch, window)),
        order[steps * global_batch :],
    ]
    taken = np.concatenate([rows[np.argsort(-lengths[rows], kind="stable")] for rows in windows])
    # The keys behind those of the rows.
    keys = _bits(seed, epoch).random_raw(len(order) + steps)[len(order) :]
    shuffled = taken[: steps * global_batch].reshape(steps, global_batch)[np.argsort(keys, kind="stable")]
    return np.concatenate([shuffled.ravel(), taken[steps * global_batch :]])


def _bits(seed: int, epoch: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence((seed, epoch)))


@dataclass(frozen=True, eq=False)
class Plan:
    """How `epochs` passes over `rows` rows are cut into steps of `global_batch` rows.

    Step s of an epoch takes rows s * global_batch ... of the epoch's order. The remainder of an epoch is left out,
    or, without `drop_remainder`, becomes a last step filled up with FILL. With `lengths` (int32 [rows]) the shuffled
    order brings rows of similar length together.
    """

    rows: int
    global_batch: int
    epochs: int
    seed: int
    shuffle: bool
    drop_remainder: bool
    lengths: np.ndarray | None = None

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
        order = self._order(epoch)
        taken = order[step * self.global_batch : (step + 1) * self.global_batch]
        return np.pad(taken, (0, self.global_batch - len(taken)), constant_values=FILL)

    @cached_property
    def _order(self) -> Callable[[int], np.ndarray]:
        return lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, epoch: int) -> np.ndarray:
        if self.lengths is None:
            return epoch_order(self.seed, epoch, self.rows, self.shuffle)
        return grouped_order(self.seed, epoch, self.lengths, self.global_batch)
