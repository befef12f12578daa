"""The batches of a run: every step's rows, dealt to micro-batches and ranks, equal for every engine."""

from collections.abc import Iterator

import numpy as np

from msft.backend.contract import IGNORE, Batch
from msft.console import note
from msft.data.collate import EMPTY, PADDINGS, Example, align, collate, width_of
from msft.data.dataset import RowDataset
from msft.data.order import FILL, Plan
from msft.data.prefetch import prefetch as ahead
from msft.errors import InputError, did_you_mean


class BatchStream:
    """The micro-batches of one rank for every step of a run.

    A step takes batch_size * world * gradient_accumulation_steps rows of the epoch's order. Row p of them goes to
    micro-batch p // (batch_size * world), within it to rank p // batch_size % world: the rows of a micro-batch over
    all ranks, and its width, are the same for any number of ranks with equal batch_size * world.
    `num_samples` limits the data to its first rows. `vocab_size` makes ids outside it an error. `where` names the
    data in messages. Raises InputError for data or settings that give no step.
    """

    def __init__(
        self,
        dataset: RowDataset,
        *,
        batch_size: int,
        pad_id: int,
        gradient_accumulation_steps: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_remainder: bool = True,
        epochs: int = 1,
        num_samples: int | None = None,
        padding: str = "longest",
        bucket_size: int = 64,
        vocab_size: int | None = None,
        where: str = "train_dataset",
    ):
        self._dataset, self._where = dataset, where
        self._batch_size, self._micro_batches = batch_size, gradient_accumulation_steps
        self._rank, self._world = rank, world
        self._pad_id, self._padding, self._bucket_size, self._vocab_size = pad_id, padding, bucket_size, vocab_size
        self._check_settings(num_samples, epochs, seed)
        self._plan = Plan(
            rows=len(dataset) if num_samples is None else min(num_samples, len(dataset)),
            global_batch=batch_size * world * gradient_accumulation_steps,
            epochs=epochs,
            seed=seed,
            shuffle=shuffle,
            drop_remainder=drop_remainder,
        )
        if not self.steps_per_epoch:
            raise InputError(
                f"{where}: {self._plan.rows} rows do not fill one step of {self._plan.global_batch} (batch_size x ranks"
                " x gradient_accumulation_steps), and drop_remainder leaves them out"
            )
        self._lengths = np.full(self._plan.rows, -1, np.int32)
        self._unsupervised: set[int] = set()
        self.row_length = self._example(0).capacity
        self._handed_out = dict.fromkeys(("steps", "tokens", "supervised_tokens"), 0)
        self._announced = False

    def _check_settings(self, num_samples: int | None, epochs: int, seed: int) -> None:
        where, problems = self._where, []
        counts = {
            "batch_size": self._batch_size,
            "gradient_accumulation_steps": self._micro_batches,
            "epochs": epochs,
            "bucket_size": self._bucket_size,
            "num_samples": 1 if num_samples is None else num_samples,
        }
        problems += [f"{where}: {name} is {count}, it must be 1 or more" for name, count in counts.items() if count < 1]
        if seed < 0:
            problems.append(f"{where}: seed is {seed}, it must be 0 or more")
        if self._padding not in PADDINGS:
            near = did_you_mean(self._padding, PADDINGS)
            problems.append(f"{where}: unknown padding {self._padding!r}{near} (known: {', '.join(PADDINGS)})")
        if not len(self._dataset):
            problems.append(f"{where}: has no rows")
        elif "input_ids" not in self._dataset.columns:
            problems.append(f"{where}: has no column 'input_ids' (columns: {', '.join(self._dataset.columns)})")
        if problems:
            raise InputError(*problems)

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""
        return self._plan.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps in all epochs."""
        return self._plan.total_steps

    def position(self, step: int) -> tuple[int, int]:
        """Return (epoch, step within the epoch) of a step, all counted from 0."""
        return self._plan.position(step)

    def row_numbers(self, step: int) -> list[int]:
        """Return the rows that a step (from 0) takes on all ranks, by their numbers in the dataset; not the fill."""
        return [int(row) for row in self._plan.rows_of(step) if row != FILL]

    def steps(self, start: int = 0, prefetch: int = 2) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step from `start` on, one list an optimizer step.

        A background thread keeps `prefetch` steps ready (0 = none); it ends with the iterator.
        """
        if not 0 <= start <= self.total_steps:
            raise InputError(f"{self._where}: cannot start at step {start}, there are {self.total_steps}")
        self._announce()
        return self._counted(start, prefetch)

    def _counted(self, start: int, depth: int) -> Iterator[list[Batch]]:
        count = self._handed_out
        for batches in ahead((self._step(step) for step in range(start, self.total_steps)), depth):
            count["steps"] += 1
            count["tokens"] += sum(batch.tokens for batch in batches)
            count["supervised_tokens"] += sum(batch.supervised for batch in batches)
            yield batches

    def report(self) -> dict[str, int]:
        """Return counts for the run's report.

        Of an epoch over all ranks: `rows`, `dropped_rows`, `fill_rows`, `rows_per_step`, `steps_per_epoch`. Of this
        rank, handed out so far: `steps`, `tokens` (padding not counted), `supervised_tokens`. `unsupervised_rows`:
        different rows without any label that this rank has read so far.
        """
        plan = self._plan
        return {
            "rows": plan.rows,
            "dropped_rows": plan.dropped_rows,
            "fill_rows": plan.fill_rows,
            "rows_per_step": plan.global_batch,
            "steps_per_epoch": plan.steps_per_epoch,
            **self._handed_out,
            "unsupervised_rows": len(self._unsupervised),
        }

    def _announce(self) -> None:
        plan = self._plan
        if self._announced:
            return
        self._announced = True
        if plan.dropped_rows:
            note(f"{self._where}: {plan.dropped_rows} of {plan.rows} rows are left out of each epoch (drop_remainder)")
        if plan.fill_rows:
            note(f"{self._where}: an epoch's last step holds {plan.fill_rows} masked rows to be of full size")

    def _step(self, step: int) -> list[Batch]:
        rows = self._plan.rows_of(step).reshape(self._micro_batches, self._world, self._batch_size)
        return [self._micro_batch(number, dealt) for number, dealt in enumerate(rows)]

    def _micro_batch(self, number: int, dealt: np.ndarray) -> Batch:
        """Build this rank's part of a micro-batch; `dealt` holds the rows of all ranks, [world, batch_size]."""
        own = dealt[self._rank].tolist()
        examples = [EMPTY if row == FILL else self._example(row) for row in own]
        lengths = [len(example.input_ids) for example in examples]
        if self._padding != "max_length":
            others = np.delete(dealt, self._rank, axis=0).ravel().tolist()
            lengths += [self._length(row) for row in others if row != FILL]
        longest = max(lengths)
        if self._padding == "max_length" and longest > self.row_length:
            raise InputError(f"{self._where}: a row has {longest + 1} tokens, the first row {self.row_length + 1}")
        width = width_of(longest, max(longest, self.row_length), self._padding, self._bucket_size)
        first = (number * self._world + self._rank) * self._batch_size
        return collate(examples, width, self._pad_id, first)

    def _example(self, row: int) -> Example:
        try:
            example = align(self._dataset.row(row), self._pad_id, self._vocab_size)
        except InputError as error:
            raise InputError(*(f"{self._where} row {row}: {problem}" for problem in error.problems)) from None
        self._lengths[row] = len(example.input_ids)
        if not (example.labels != IGNORE).any():
            self._unsupervised.add(row)
        return example

    def _length(self, row: int) -> int:
        """Return the real length of a row that another rank trains on; it is read once in a run."""
        return int(self._lengths[row]) if self._lengths[row] >= 0 else len(self._example(row).input_ids)


def evaluation_batches(dataset: RowDataset, *, where: str = "eval_dataset", **settings) -> BatchStream:
    """Return a BatchStream over every row once, in order; the last step is filled up with masked rows.

    `settings` are BatchStream's batch_size, pad_id, rank, world, num_samples, padding, bucket_size and vocab_size.
    """
    return BatchStream(dataset, shuffle=False, drop_remainder=False, epochs=1, where=where, **settings)
