"""How an encoder-decoder's examples stand in a batch: a segment's source first, behind it the decoder's inputs.

The border of a segment is its first supervised position, where the decoder's start token stands; one without a
supervised position is all source. So packing, sampling, positions and dropout's counters are those of any batch.
"""

from typing import NamedTuple

import numpy as np

from msft.backend.contract import IGNORE, Batch, Precision
from msft.backend.line import Line, length
from msft.backend.mesh import Mesh
from msft.backend.segments import spans
from msft.errors import RunError


class Side(NamedTuple):
    """The sources or the targets of a batch one after another.

    `places` int64 [tokens] are theirs in the batch, read row by row; `borders` int64 [segments + 1] tell where each
    segment's begin and end among them.
    """

    places: np.ndarray
    borders: np.ndarray

    def line(self, batch: Batch, keys: "Side | None" = None) -> Line:
        """Return the line of their tokens; its pieces see the same segment's `keys` (None: themselves).

        A segment without a token here has no piece.
        """
        seen, tokens = keys or self, len(self.places)
        size = length(tokens)
        pieces = np.column_stack((self.borders[:-1], self.borders[1:], seen.borders[:-1], seen.borders[1:]))
        arrays = (self._filled(array, size) for array in (batch.input_ids, batch.position_ids))
        order = np.arange(length(len(seen.places)))
        pieces = pieces[pieces[:, 1] > pieces[:, 0]]
        return Line(self.places, *arrays, pieces, order, np.zeros(len(pieces), int))

    def positions(self) -> np.ndarray:
        """Return each token's place within its segment on this side, int64 [tokens]."""
        return np.arange(len(self.places)) - np.repeat(self.borders[:-1], np.diff(self.borders))

    def lengths(self) -> list[int]:
        """Return how many tokens of each segment stand here."""
        return np.diff(self.borders).tolist()

    def _filled(self, values: np.ndarray, size: int) -> np.ndarray:
        return np.pad(values.reshape(-1)[self.places], (0, size - len(self.places)))


class Split(NamedTuple):
    """A batch's two sides, with the same number of segments each."""

    batch: Batch
    source: Side
    target: Side


def overflow(precision: Precision) -> dict[str, str]:
    """Say what becomes of hidden states that float16 does not hold, which T5 is known for."""
    if precision.compute != "float16":
        return {}
    return {"overflow": "float16 states are not clamped: a step with infinite ones is skipped; bfloat16 holds them"}


def check_whole(mesh: Mesh, is_sharded: bool) -> None:
    """Raise RunError for processes that would share out an encoder-decoder, whose layers and weights each has whole."""
    if mesh.parts > 1 or mesh.context > 1 or is_sharded:
        raise RunError("an encoder-decoder is not dealt to several processes: each has it whole (data_parallel, ddp)")


def split(batch: Batch) -> Split:
    """Return the sides of a batch.

    Raises RunError for a segment without a source and for one with an unsupervised token behind its border.
    """
    rows, width = batch.labels.shape
    supervised = (batch.labels != IGNORE).reshape(-1)
    found = spans(batch.segment_ids)
    starts, ends = found[:, 0] * width + found[:, 1], found[:, 0] * width + found[:, 2]
    counted = np.concatenate(([0], np.cumsum(supervised)))
    targets = counted[ends] - counted[starts]
    borders = ends - targets
    # All supervised positions stand behind the border only if as many do.
    _check(found, counted[ends] - counted[borders] != targets, "has an unsupervised token behind its first supervised")
    _check(found, borders == starts, "is supervised from its first token on, so that it has no source")
    return Split(batch, _side(starts, borders), _side(borders, ends))


def sources(input_ids: np.ndarray, padding: np.ndarray) -> Split:
    """Return left-padded prompts int32 [rows, length] with `padding` int32 [rows] as sources without targets."""
    places = np.arange(input_ids.shape[1]) - padding[:, None]
    real = (places >= 0).astype(np.int32)
    labels = np.full(input_ids.shape, IGNORE, np.int32)
    return split(Batch(input_ids, labels, np.maximum(places, 0).astype(np.int32), real, real * 0))


def _side(starts: np.ndarray, ends: np.ndarray) -> Side:
    lengths = ends - starts
    borders = np.concatenate(([0], np.cumsum(lengths)))
    return Side(np.arange(borders[-1]) + np.repeat(starts - borders[:-1], lengths), borders)


def _check(found: np.ndarray, is_wrong: np.ndarray, what: str) -> None:
    if is_wrong.any():
        row, start, end = found[np.flatnonzero(is_wrong)[0]].tolist()
        raise RunError(
            f"row {row} of a batch: the example at [{start}, {end}) {what}; an encoder-decoder learns from a source "
            "and one answer behind it, as llama_preprocess writes them beside its config.json"
        )
