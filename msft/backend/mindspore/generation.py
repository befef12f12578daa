"""Generation with a key-value cache of a fixed size, so that the compiled functions serve every new token."""

import numpy as np
from mindspore import Tensor

from msft.backend import prefix
from msft.backend.mindspore import ops
from msft.backend.mindspore.attention import MASKED
from msft.models import rope

# Prompts and caches are padded to multiples of this, so that few shapes are compiled.
BUCKET = 64


class Session:
    """A batch being generated; see `decoding.Session`."""

    bucket = BUCKET

    def __init__(self, model, max_new_tokens: int):
        self.decoder = model.decoder
        self.room = -(-max_new_tokens // BUCKET) * BUCKET
        self.slot = 0

    def prefill(self, input_ids: np.ndarray, padding: np.ndarray) -> np.ndarray:
        """Take left-padded prompts int32 [rows, length] with `padding` int32 [rows]; return the last logits."""
        rows, length = input_ids.shape
        self.padding, self.capacity = padding, length + self.room
        self.next_positions = length - padding
        self.heads = self.decoder.spec.num_key_value_heads
        self.caches = self._empty(rows * self.heads * self.capacity)
        self.weight = self.decoder.head_weight()
        slots = np.arange(length)
        real = (slots >= padding[:, None]).astype(np.int32)
        contexts = prefix.contexts(self.decoder.spec, input_ids, real).max(axis=1)
        seen = (slots <= slots[:, None]) | (slots < (padding + contexts)[:, None, None])
        seen &= slots >= padding[:, None, None]
        # A padding query sees itself, so that its softmax has something to sum.
        seen |= slots == slots[:, None]
        positions = np.maximum(slots[None, :] - padding[:, None], 0).astype(np.int32)
        turned = prefix.positions(self.decoder.spec, input_ids, positions, real)
        self.turned = turned[..., -1:]
        first, last = [*self._tables(turned), self.decoder.cached_blocks.turn], self._places(length)
        near = {
            window: self.decoder.tensor(seen & self._near(slots[:, None], slots, window)) for window in self._windows
        }
        hidden = self.decoder.entrance.of(input_ids, positions)
        for number, (layout, _) in enumerate(self.decoder.layers):
            shared = *first, near[self.decoder.windows[number]], last
            hidden = self.decoder.cached_blocks.prompt(layout)(hidden, *shared, *self._layer(number))
            hidden = self.decoder.cached_blocks.routed(number, hidden)
        return self._logits(hidden[:, -1])

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take one more token for each row, int32 [rows]; return the next logits, float32 [rows, vocabulary]."""
        slots, blocks = np.arange(self.capacity), self.decoder.cached_blocks
        seen = (slots <= self.slot) & (slots >= self.padding[:, None])
        biases = {window: self._bias(seen & self._near(self.slot, slots, window)) for window in self._windows}
        positions = self.next_positions[:, None].astype(np.int32)
        self.turned = prefix.following(self.decoder.spec, self.turned)
        first, last = [*self._tables(self.turned), blocks.turn], self._places(1)
        self.next_positions = self.next_positions + 1
        hidden = self.decoder.entrance.of(tokens, positions[:, 0])
        for group in blocks.groups:
            layouts = tuple(self.decoder.layers[number][0] for number in group)
            tensors = [tensor for number in group for tensor in self._layer(number)]
            shared = *first, biases[self.decoder.windows[group[0]]], last
            hidden = blocks.tokens(layouts)(hidden, *shared, *tensors)
            hidden = blocks.routed(group[-1], hidden)
        return self._logits(hidden)

    @property
    def _windows(self) -> set[int]:
        """The windows of the decoder's layers; 0 = none."""
        return set(self.decoder.windows)

    def _near(self, queries, keys: np.ndarray, window: int) -> np.ndarray:
        """Which keys are within a window before queries, by their slots."""
        return queries - keys < (window or self.capacity)

    def _bias(self, seen: np.ndarray) -> Tensor:
        """What hides the slots that a row's token does not see, [rows x kv_heads, 1, capacity]."""
        return self.decoder.tensor(np.where(seen, 0.0, MASKED).astype(np.float32)[:, None].repeat(self.heads, axis=0))

    def _tables(self, positions: np.ndarray) -> list[Tensor]:
        """Rotary tables [rows x length, 1, head_dim] for positions [rows, length], or two of each."""
        tables = rope.tables_by_row(self.decoder.spec, positions)
        return [self.decoder.tensor(table.reshape(-1, 1, table.shape[-1])) for table in tables]

    def _places(self, length: int) -> Tensor:
        """Where the next `length` keys of each row and head stand in a layer's cache; the slots are taken with it."""
        first = np.arange(len(self.padding) * self.heads, dtype=np.int32)[:, None] * self.capacity
        places = first + np.arange(self.slot, self.slot + length, dtype=np.int32)
        self.slot += length
        return self.decoder.tensor(places.reshape(-1, 1))

    def _layer(self, number: int) -> list[Tensor]:
        return [*self.caches[number], *map(self.decoder.parameter, self.decoder.layers[number][1])]

    def _logits(self, hidden: Tensor) -> np.ndarray:
        tensors = map(self.decoder.parameter, self.decoder.norm.names)
        return self.decoder.cached_blocks.finish(hidden, self.weight, *tensors).asnumpy()

    def _empty(self, places: int) -> list[list[Tensor]]:
        spec, runtime = self.decoder.spec, self.decoder.runtime
        zeros = np.zeros((places, spec.head_dim), np.float32)
        return [
            [ops.from_numpy(zeros, runtime.device, runtime.precision.compute) for _ in range(2)]
            for _ in range(spec.num_hidden_layers)
        ]
