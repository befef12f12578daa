"""How MindSpore cuts a parameter over the ranks of a pipeline stage, and which slice each rank holds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# Far more than any cluster, and few enough to count them one by one.
MAX_RANKS = 2**16


class Layout(NamedTuple):
    """The cut of one parameter.

    `devices` is the arrangement of the stage's ranks, of which the last dimension changes fastest. `axes` has for each
    axis of the parameter the dimensions of `devices` (counted from the first) that cut it, the coarsest first. Each
    slice is cut further along axis 0 into `shards`, which go to the ranks that hold the same slice (the optimizer's
    shards), one after another.
    """

    devices: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    shards: int = 1

    def ranks(self) -> int:
        """Return how many ranks a stage has."""
        return math.prod(self.devices)

    def counts(self) -> tuple[int, ...]:
        """Return into how many parts each axis is cut."""
        counts = [math.prod(self.devices[dim] for dim in axis) for axis in self.axes]
        if self.shards > 1:
            counts[0] *= self.shards
        return tuple(counts)

    def place(self, rank: int) -> tuple[int, ...]:
        """Return which part of each axis a rank (counted within its stage) holds."""
        coordinates, left = [], rank
        for size in reversed(self.devices):
            coordinates.insert(0, left % size)
            left //= size
        places = [self._number(axis, coordinates) for axis in self.axes]
        if self.shards > 1:
            places[0] = places[0] * self.shards + self._number(self._repeats(), coordinates) % self.shards
        return tuple(places)

    def copies(self) -> int:
        """Return how many ranks hold the same slice, before it is cut into shards."""
        return math.prod(self.devices[dim] for dim in self._repeats())

    def _repeats(self) -> list[int]:
        cutting = {dim for axis in self.axes for dim in axis}
        return [dim for dim in range(len(self.devices)) if dim not in cutting]

    def _number(self, dims: Sequence[int], coordinates: Sequence[int]) -> int:
        number = 0
        for dim in dims:
            number = number * self.devices[dim] + coordinates[dim]
        return number


def from_mindspore(devices: Sequence[int], tensor_map: Sequence[Sequence[int]], step: int, size: int) -> Layout:
    """Return the layout that a strategy file describes.

    `tensor_map` has for each axis the dimensions of the device matrix that cut it, counted from the last; -1 cuts
    nothing. `size` is into how many shards the optimizer cuts each slice: -1 is one for every copy, 0 (or a `step` of
    0) none; `step` is how far apart the ranks of a group are. Raises ValueError for what no model is cut by.
    """
    if not all(count > 0 for count in devices) or math.prod(devices) > MAX_RANKS:
        raise ValueError(f"the device matrix {list(devices)} is impossible")
    used = [dim for axis in tensor_map for dim in axis if dim != -1]
    if not all(0 <= dim < len(devices) for dim in used) or len(set(used)) < len(used):
        raise ValueError(f"the tensor map {list(map(list, tensor_map))} does not fit the device matrix {list(devices)}")
    axes = tuple(tuple(len(devices) - 1 - dim for dim in axis if dim != -1) for axis in tensor_map)
    layout = Layout(tuple(devices), axes)
    copies = layout.copies()
    shards = copies if size == -1 else size
    if step == 0 or size == 0 or shards == 1:
        return layout
    if shards < 0 or copies % shards or not axes:
        raise ValueError(f"{copies} copies of a slice cannot be cut into {size} shards (opt_weight_shard_size)")
    repeated = [dim for dim in range(len(devices)) if devices[dim] > 1 and dim not in sum(axes, ())]
    # With copies along several dimensions, ranks of a group are not equally far apart.
    if len(repeated) == 1 and step != math.prod(devices[repeated[0] + 1 :]):
        raise ValueError(f"the shards' ranks cannot be {step} apart (opt_weight_shard_step)")
    return layout._replace(shards=shards)
