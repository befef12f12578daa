"""Which tokens of the rows that a group of ranks shares each of them computes, and which keys these tokens see.

Each example is cut into twice as many chunks as there are ranks, and a rank takes one from either end, so that all
compute as many tokens and as many scores of causal attention. Keys and values of all ranks are gathered before each
attention, as Llama 3's training does (arXiv 2407.21783, section 3.3.2): examples in one row need no more than that.
"""

from typing import NamedTuple

import numpy as np

from msft.backend.contract import IGNORE, Batch, SharedBatch
from msft.backend.segments import spans


def owners(segment_ids: np.ndarray, ranks: int) -> np.ndarray:
    """Return the rank that computes each position of int32 [rows, length], int64 of the same shape; -1 on padding.

    What does not divide goes to another rank with each example.
    """
    found = np.full(segment_ids.shape, -1)
    for number, (row, start, end) in enumerate(spans(segment_ids).tolist()):
        chunk = np.arange(end - start) * 2 * ranks // (end - start)
        found[row, start:end] = (np.minimum(chunk, 2 * ranks - 1 - chunk) + number) % ranks
    return found


def share(batch: Batch, ranks: int, rank: int) -> Batch:
    """Return what one of the ranks computes of a batch: its own tokens, whose labels alone count there."""
    if ranks == 1:
        return batch
    own = owners(batch.segment_ids, ranks) == rank
    labels = np.where(own, batch.labels, IGNORE).astype(np.int32)
    return SharedBatch(**{**vars(batch), "labels": labels, "own": own})


class Part(NamedTuple):
    """What a rank computes of a batch's line, which is its real tokens one after another, and how it sees the rest.

    `places` int64 [own tokens] are those in the batch, read row by row. `pieces` int64 [n, 4] are stretches of own
    tokens of one example (first, end), numbered as they are computed, and the keys in the line (start, stop) that they
    see: the last token sees all, the one before all but the last ... `rank_of` and `index_of` int64 [tokens] tell who
    computes each token of the line, as which of its own; `most` is how many the busiest rank has.
    """

    places: np.ndarray
    pieces: np.ndarray
    rank_of: np.ndarray
    index_of: np.ndarray
    most: int

    def order(self, length: int) -> np.ndarray:
        """Return where each token of the line is among those of all ranks, `length` of each, one rank after another."""
        return self.rank_of * length + self.index_of

    def filled(self, unit: int, is_shared: bool = False) -> "Part":
        """Return the part with pieces for tokens that fill its line up to a multiple of `unit`, as each rank's is.

        They see themselves, or where the rows are shared, and so keys are those of all ranks, the first one.
        """
        tokens, fill = len(self.places), -len(self.places) % unit
        if not fill:
            return self._replace(most=-(-self.most // unit) * unit)
        extra = tokens + np.arange(fill)
        pieces = np.column_stack((extra, extra + 1, extra * 0, extra * 0 + 1))
        if not is_shared:
            pieces = np.array([[tokens, tokens + fill, tokens, tokens + fill]])
        return self._replace(pieces=np.concatenate((self.pieces, pieces)), most=-(-self.most // unit) * unit)

    def take(self, values: np.ndarray) -> np.ndarray:
        """Return values [rows, length] in the order of the line, [1, tokens], 0 where it is filled up."""
        found = values.reshape(1, -1)[:, self.places]
        return np.pad(found, ((0, 0), (0, int(self.pieces[-1, 1]) - len(self.places))))

    def stand_in(self) -> "Part":
        """Return what a rank without a token computes, so that it takes part: the batch's first place, for nothing."""
        return self._replace(places=np.zeros(1, np.int64), pieces=np.array([[0, 1, 0, 1]]))


def part(segment_ids: np.ndarray, ranks: int = 1, rank: int = 0) -> Part:
    """Return a rank's part of a batch, int32 [rows, length]; a single rank's is all of it."""
    dealt = owners(segment_ids, ranks).reshape(-1)
    line = np.flatnonzero(dealt >= 0)
    rank_of, index_of = dealt[line], np.zeros(len(line), np.int64)
    for other in range(ranks):
        index_of[rank_of == other] = np.arange((rank_of == other).sum())
    lengths = np.diff(spans(segment_ids)[:, 1:], axis=1).ravel()
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    own = np.flatnonzero(rank_of == rank)
    most = int(np.bincount(rank_of, minlength=1).max())
    return Part(line[own], _pieces(own, starts[own]), rank_of, index_of, most)


def _pieces(own: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The stretches of tokens at the places `own` of the line, whose examples begin at `starts`."""
    begins = (np.diff(own, prepend=-2) != 1) | (np.diff(starts, prepend=-1) != 0)
    first = np.flatnonzero(begins)
    end = np.append(first[1:], len(own))[: len(first)]
    return np.column_stack((first, end, starts[first], own[end - 1] + 1))
