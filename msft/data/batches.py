"""The batches of a run: every step's rows, dealt to micro-batches and ranks, equal for every engine."""

from collections.abc import Iterator

import numpy as np

from msft.backend import context
from msft.backend.contract import IGNORE, Batch
from msft.console import note
from msft.data.collate import PADDINGS, Example, align, collate, width_of
from msft.data.dataset import RowDataset
from msft.data.lengths import row_lengths
from msft.data.order import Plan
from msft.data.packing import one_each, pack
from msft.data.prefetch import prefetch as ahead
from msft.errors import InputError, did_you_mean


class BatchStream:
    """The micro-batches of one rank for every step of a run.

    A step takes batch_size * world * gradient_accumulation_steps rows of the epoch's order. Row p of them goes to
    micro-batch p // (batch_size * world), within it to rank p // batch_size % world: the rows of a micro-batch over
    all ranks, and its width, are the same for any number of ranks with equal batch_size * world.
    With `packing` a row of a batch is a pack: whole rows of the data, as many as fit the longest one's place
    (`packing.pack`); the packs stay the same, each epoch has its order of them. `length_grouping` has the rows of a
    step of similar length (`order.grouped_order`). Both measure all rows first.
    Several processes may share the tokens of a rank's rows: this one has part number `part` of `parts`.
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
        part: int = 0,
        parts: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_remainder: bool = True,
        epochs: int = 1,
        num_samples: int | None = None,
        padding: str = "longest",
        bucket_size: int = 64,
        packing: bool = False,
        length_grouping: bool = False,
        vocab_size: int | None = None,
        where: str = "train_dataset",
    ):
        self._dataset, self._where = dataset, where
        self._batch_size, self._micro_batches = batch_size, gradient_accumulation_steps
        self._rank, self._world, self._part, self._parts = rank, world, part, parts
        self._pad_id, self._padding, self._bucket_size, self._vocab_size = pad_id, padding, bucket_size, vocab_size
        self._check_settings(num_samples, epochs, seed)
        rows = len(dataset) if num_samples is None else min(num_samples, len(dataset))
        self._lengths, self._unsupervised = np.full(rows, -1, np.int32), set()
        self.row_length, self.packing = self._example(0).capacity, packing
        if packing or length_grouping:
            self._lengths = row_lengths(dataset, rows, pad_id)
            self.row_length = max(self.row_length, int(self._lengths.max()))
        self._packs = pack(self._lengths, self.row_length) if packing else one_each(rows)
        self._plan = Plan(
            rows=len(self._packs),
            global_batch=batch_size * world * gradient_accumulation_steps,
            epochs=epochs,
            seed=seed,
            shuffle=shuffle,
            drop_remainder=drop_remainder,
            lengths=self._lengths if length_grouping else None,
        )
        if not self.steps_per_epoch:
            raise InputError(
                f"{where}: {self._count} do not fill one step of {self._plan.global_batch} (batch_size x ranks x "
                "gradient_accumulation_steps), and drop_remainder leaves them out"
            )
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
        return [row for number in self._plan.rows_of(step).tolist() for row in self._packs.rows_of(number)]

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
        different rows without any label that this rank has read so far. With packing, rows (the last ones excepted)
        are packed rows; `examples` counts the data's and `filled` is the part of the packed rows that holds tokens.
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
            **({"examples": len(self._lengths), "filled": self._filled} if self.packing else {}),
        }

    def describe(self) -> str:
        """Say how many rows of which length there are, and what packing makes of them."""
        rows = f"{self._plan.rows:,} rows of"
        if not self.packing:
            return f"{rows} up to {self.row_length} tokens"
        share = f"{100 * self._filled:.1f} % filled"
        return f"{len(self._lengths):,} examples packed into {rows} {self.row_length} tokens, {share}"

    @property
    def _filled(self) -> float:
        return int(self._lengths.sum(dtype=np.int64)) / max(1, len(self._packs) * self.row_length)

    @property
    def _count(self) -> str:
        return f"{self._plan.rows} packed rows" if self.packing else f"{self._plan.rows} rows"

    def _announce(self) -> None:
        plan = self._plan
        if self._announced:
            return
        self._announced = True
        if plan.dropped_rows:
            note(f"{self._where}: {plan.dropped_rows} of {self._count} are left out of each epoch (drop_remainder)")
        if plan.fill_rows:
            note(f"{self._where}: an epoch's last step holds {plan.fill_rows} masked rows to be of full size")

    def _step(self, step: int) -> list[Batch]:
        packs = self._plan.rows_of(step)
        sizes = self._packs.sizes(packs)
        shape = (self._micro_batches, self._world, self._batch_size)
        first_ids = (np.cumsum(sizes) - sizes).reshape(shape)
        return [self._micro_batch(*dealt) for dealt in zip(packs.reshape(shape), first_ids, strict=True)]

    def _micro_batch(self, dealt: np.ndarray, first_ids: np.ndarray) -> Batch:
        """Build this rank's part of a micro-batch.

        `dealt` holds the packs of all ranks, [world, batch_size], `first_ids` the place in the step of the first
        example of each.
        """
        own = dealt[self._rank].tolist()
        rows = [[self._example(row) for row in self._packs.rows_of(number)] for number in own]
        lengths = [sum(len(example.input_ids) for example in examples) for examples in rows]
        if self._padding != "max_length":
            others = np.delete(dealt, self._rank, axis=0).ravel().tolist()
            lengths += [sum(map(self._length, self._packs.rows_of(number))) for number in others]
        longest = max(lengths)
        if self._padding == "max_length" and longest > self.row_length:
            raise InputError(f"{self._where}: a row has {longest + 1} tokens, the first row {self.row_length + 1}")
        width = width_of(longest, max(longest, self.row_length), self._padding, self._bucket_size)
        whole = collate(rows, width, self._pad_id, first_ids[self._rank].tolist())
        return context.share(whole, self._parts, self._part)

    def _example(self, row: int) -> Example:
        try:
            example = align(self._dataset.row(row), self._pad_id, self._vocab_size)
        except InputError as error:
            raise InputError(*(f"{self._where} row {row}: {problem}" for problem in error.problems)) from None
        length = len(example.input_ids)
        if self._lengths[row] < 0:
            self._lengths[row] = length
        elif self._lengths[row] != length:
            raise InputError(f"{self._where} row {row}: has {length} tokens where {self._lengths[row]} were measured")
        if not (example.labels != IGNORE).any():
            self._unsupervised.add(row)
        return example

    def _length(self, row: int) -> int:
        """Return the real length of a row that another rank trains on; it is read once in a run."""
        return int(self._lengths[row]) if self._lengths[row] >= 0 else len(self._example(row).input_ids)


def evaluation_batches(dataset: RowDataset, *, where: str = "eval_dataset", **settings) -> BatchStream:
    """Return a BatchStream over every row once, in order; the last step is filled up with masked rows.

    `settings` are BatchStream's batch_size, pad_id, rank, world, part, parts, num_samples, padding, bucket_size,
    packing and vocab_size.
    """
    return BatchStream(dataset, shuffle=False, drop_remainder=False, epochs=1, where=where, **settings)
