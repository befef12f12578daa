"""Which rows share a row of a batch: whole examples, best fit decreasing, a pure function of their lengths.

Best fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973) takes the examples from the longest to the
shortest and puts each into the fullest pack that it fits into, as first fit decreasing does with the first one.
"""

from bisect import bisect_left, insort
from collections import deque

import numpy as np

from msft.data.order import FILL


class Packs:
    """Rows of a dataset by pack: pack p holds rows[starts[p] : starts[p + 1]]; both int32, 4 bytes a row each."""

    def __init__(self, rows: np.ndarray, starts: np.ndarray):
        self.rows, self.starts = rows, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows_of(self, pack: int) -> list[int]:
        """Return the numbers of a pack's rows in their order within it; the pack FILL has none."""
        return [] if pack == FILL else self.rows[self.starts[pack] : self.starts[pack + 1]].tolist()

    def sizes(self, packs: np.ndarray) -> np.ndarray:
        """Return how many rows each of some packs has, int64; FILL has none."""
        return np.where(packs == FILL, 0, self.starts[packs + 1] - self.starts[packs])


def one_each(rows: int) -> Packs:
    """Return packs of one row each, in the data's order."""
    return Packs(np.arange(rows, dtype=np.int32), np.arange(rows + 1, dtype=np.int32))


def pack(lengths: np.ndarray, capacity: int) -> Packs:
    """Pack examples of `lengths` tokens (int32 [rows]) into packs of at most `capacity` tokens each.

    Examples of equal length are taken in the data's order; an empty one takes the room of one token. Every length must
    be at most `capacity`. Takes a sort, and one operation for each group of packs alike in room and example.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    descending = np.maximum(lengths[order], 1)
    filling, pack_of = _Filling(max(capacity, 1)), np.empty(len(order), np.int32)
    bounds = [0, *(np.flatnonzero(np.diff(descending)) + 1).tolist(), len(order)]
    for first, end in zip(bounds, bounds[1:], strict=False):
        filling.add(int(descending[first]), pack_of[first:end])
    by_pack = np.argsort(pack_of, kind="stable")
    starts = np.zeros(filling.packs + 1, np.int32)
    np.cumsum(np.bincount(pack_of, minlength=filling.packs), out=starts[1:])
    return Packs(order[by_pack].astype(np.int32), starts)


class _Filling:
    """Packs while they are filled: runs of packs by the room that is left in each of them.

    Examples of one length are placed together. One after the other, each would go where the one before it went until
    that pack is too full: so a pack takes as many as fit, and packs alike in room fare alike.
    """

    def __init__(self, capacity: int):
        self._capacity, self.packs = capacity, 0
        self._runs: dict[int, deque[range]] = {}
        self._rooms: list[int] = []

    def add(self, length: int, places: np.ndarray) -> None:
        """Place len(places) examples of `length` tokens and write the numbers of their packs into `places`."""
        while len(places):
            at = bisect_left(self._rooms, length)
            room = self._rooms[at] if at < len(self._rooms) else self._open(length, len(places))
            placed = self._fill(self._take(room), room, length, places)
            places = places[placed:]

    def _open(self, length: int, examples: int) -> int:
        """Open the packs that so many examples need; returns their room."""
        opened = range(self.packs, self.packs + -(-examples // (self._capacity // length)))
        self.packs = opened.stop
        self._put(opened, self._capacity)
        return self._capacity

    def _fill(self, run: range, room: int, length: int, places: np.ndarray) -> int:
        """Put examples into the packs of a run until either ends; returns how many were placed."""
        each = room // length
        full, rest = divmod(min(len(places), len(run) * each), each)
        placed = full * each + rest
        places[:placed] = np.repeat(np.arange(run.start, run.stop, dtype=np.int32), each)[:placed]
        self._put(run[:full], room - each * length)
        if rest:
            self._put(run[full : full + 1], room - rest * length)
            full += 1
        self._put(run[full:], room, first=True)
        return placed

    def _put(self, run: range, room: int, first: bool = False) -> None:
        if not run or not room:
            return
        if room not in self._runs:
            self._runs[room] = deque()
            insort(self._rooms, room)
        runs = self._runs[room]
        runs.appendleft(run) if first else runs.append(run)

    def _take(self, room: int) -> range:
        runs = self._runs[room]
        run = runs.popleft()
        if not runs:
            del self._runs[room]
            self._rooms.remove(room)
        return run
