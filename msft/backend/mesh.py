"""Which ranks work together: those that hold parts of one model, and those that hold the same part."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mesh:
    """`pipeline` x `data` x `context` x `tensor` ranks, numbered in this order, as MindFormers and Megatron do.

    The ranks of a model's stage (`tensor`) see the same tokens, each with its slice of every matrix; those of
    `context` see parts of the same rows with the same slice, those of `data` different rows. The stages of `pipeline`
    have different layers. Ranks that differ in `data` and `context` alone are replicas: they hold the same weights.
    With `sequence` each of `tensor` has its part of the tokens where the model is not cut, with `vocabulary` its rows
    of the embedding and the head; where `tensor` is 1 neither means anything.
    """

    data: int = 1
    tensor: int = 1
    rank: int = 0
    context: int = 1
    pipeline: int = 1
    sequence: bool = False
    vocabulary: bool = False

    @property
    def replicas(self) -> int:
        """How many ranks hold the same weights."""
        return self.data * self.context

    @property
    def stage(self) -> int:
        """This rank's share of the layers, from 0."""
        return self.rank // (self.replicas * self.tensor)

    @property
    def is_last_stage(self) -> bool:
        """Whether the last layers are this rank's."""
        return self.stage == self.pipeline - 1

    @property
    def replica_rank(self) -> int:
        """This rank's place among those that hold the same weights, from 0."""
        return self.rank // self.tensor % self.replicas

    @property
    def data_rank(self) -> int:
        """This rank's share of the rows, from 0."""
        return self.replica_rank // self.context

    @property
    def context_rank(self) -> int:
        """This rank's share of the tokens of its rows, from 0."""
        return self.replica_rank % self.context

    @property
    def tensor_rank(self) -> int:
        """This rank's slice of the matrices, from 0."""
        return self.rank % self.tensor

    @property
    def is_sequence_cut(self) -> bool:
        """Whether a rank has its part of the tokens alone between the modules that are cut."""
        return self.sequence and self.tensor > 1

    @property
    def is_vocabulary_cut(self) -> bool:
        """Whether a rank has its rows of the embedding and the head alone."""
        return self.vocabulary and self.tensor > 1

    @property
    def shares_losses(self) -> bool:
        """Whether each rank of a model has the losses of its share of the positions, by a head that is whole."""
        return self.tensor > 1 and not self.vocabulary

    @property
    def parts(self) -> int:
        """How many ranks hold a model together."""
        return self.tensor * self.pipeline

    def shards(self, strategy: str) -> bool:
        """Whether a strategy leaves each rank with a part of what is tuned: one rank has nobody to share it with."""
        return strategy != "ddp" and self.replicas > 1

    @property
    def tensor_groups(self) -> list[list[int]]:
        """The ranks of each model's stage."""
        return self._numbers().reshape(-1, self.tensor).tolist()

    @property
    def replica_groups(self) -> list[list[int]]:
        """The ranks that hold the same weights."""
        return self._numbers().transpose(0, 3, 1, 2).reshape(-1, self.replicas).tolist()

    @property
    def context_groups(self) -> list[list[int]]:
        """The ranks with parts of the same rows and the same weights."""
        return self._numbers().swapaxes(2, 3).reshape(-1, self.context).tolist()

    @property
    def pipeline_groups(self) -> list[list[int]]:
        """The ranks that pass hidden states to each other, from the first stage to the last."""
        return self._numbers().reshape(self.pipeline, -1).T.tolist()

    @property
    def end_groups(self) -> list[list[int]]:
        """The ranks of the first and the last stage of each of `pipeline_groups`."""
        return [[ranks[0], ranks[-1]] for ranks in self.pipeline_groups]

    def neighbour_groups(self, stage: int) -> list[list[int]]:
        """Return the ranks of a stage and of the next one that pass hidden states to each other."""
        return [ranks[stage : stage + 2] for ranks in self.pipeline_groups]

    def neighbour(self, ahead: bool) -> int:
        """Return the rank that takes this one's place in the next stage, or in the one before."""
        return self.rank + (1 if ahead else -1) * self.replicas * self.tensor

    def _numbers(self) -> np.ndarray:
        sizes = self.pipeline, self.data, self.context, self.tensor
        return np.arange(self.pipeline * self.replicas * self.tensor).reshape(sizes)

    def rows(self, count: int) -> slice:
        """Return this rank's share of the rows of a tensor, by its place among replicas; there may be none."""
        return slice(count * self.replica_rank // self.replicas, count * (self.replica_rank + 1) // self.replicas)

    def own_losses(self, count: int) -> slice:
        """Return this rank's share of the supervised positions of a micro-batch: all of them unless they are shared."""
        if not self.shares_losses:
            return slice(0, count)
        return slice(count * self.tensor_rank // self.tensor, count * (self.tensor_rank + 1) // self.tensor)

    def own_tokens(self, count: int) -> slice:
        """Return this rank's part of a line of tokens, whose length `tensor` divides; all of it where it is whole."""
        if not self.is_sequence_cut:
            return slice(0, count)
        size = count // self.tensor
        return slice(size * self.tensor_rank, size * (self.tensor_rank + 1))

    def sum_over_replicas(self, gathered: np.ndarray) -> np.ndarray:
        """Sum numbers of all ranks [ranks, n] over replicas; of those of a model's parts the largest counts.

        So that a signal to one of them, and a loss that the last stage alone knows, is seen too.
        """
        return self._by_part(gathered).max(axis=(0, 2)).sum(axis=0)

    def sum_over_parts(self, gathered: np.ndarray) -> np.ndarray:
        """Sum numbers of all ranks [ranks, n] over those that hold this one's model together."""
        return self._by_part(gathered)[:, self.replica_rank].sum(axis=(0, 1))

    def _by_part(self, gathered: np.ndarray) -> np.ndarray:
        return gathered.reshape(self.pipeline, self.replicas, self.tensor, -1)
