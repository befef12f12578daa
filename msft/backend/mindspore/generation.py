"""Generation with a key-value cache of a fixed size, so that the compiled functions serve every new token."""

import numpy as np
from mindspore import Tensor

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
        seen = (slots <= slots[:, None]) & (slots >= padding[:, None, None])
        # A padding query sees itself, so that its softmax has something to sum.
        seen |= slots == slots[:, None]
        positions = np.maximum(slots[None, :] - padding[:, None], 0)
        turn = self.decoder.cached_blocks.turn
        shared = [*self._tables(positions), turn, self.decoder.tensor(seen), self._places(length)]
        hidden = self._embedded(input_ids)
        for number, (layout, _) in enumerate(self.decoder.layers):
            hidden = self.decoder.cached_blocks.prompt(layout)(hidden, *shared, *self._layer(number))
        return self._logits(hidden[:, -1])

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take one more token for each row, int32 [rows]; return the next logits, float32 [rows, vocabulary]."""
        slots, blocks = np.arange(self.capacity), self.decoder.cached_blocks
        seen = (slots <= self.slot) & (slots >= self.padding[:, None])
        bias = np.where(seen, 0.0, MASKED).astype(np.float32)[:, None].repeat(self.heads, axis=0)
        shared = [*self._tables(self.next_positions[:, None]), blocks.turn, self.decoder.tensor(bias), self._places(1)]
        self.next_positions = self.next_positions + 1
        hidden = self._embedded(tokens)
        for group in blocks.groups:
            layouts = tuple(self.decoder.layers[number][0] for number in group)
            tensors = [tensor for number in group for tensor in self._layer(number)]
            hidden = blocks.tokens(layouts)(hidden, *shared, *tensors)
        return self._logits(hidden)

    def _embedded(self, input_ids: np.ndarray) -> Tensor:
        embed = self.decoder.functions.embed
        return embed(self.decoder.parameter("model.embed_tokens.weight"), self.decoder.tensor(input_ids))

    def _tables(self, positions: np.ndarray) -> list[Tensor]:
        """Rotary tables [rows x length, 1, head_dim] for positions [rows, length]."""
        tables = rope.tables(self.decoder.spec, positions)
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
        norm = self.decoder.parameter("model.norm.weight")
        return self.decoder.cached_blocks.finish(hidden, norm, self.weight).asnumpy()

    def _empty(self, places: int) -> list[list[Tensor]]:
        spec, runtime = self.decoder.spec, self.decoder.runtime
        zeros = np.zeros((places, spec.head_dim), np.float32)
        return [
            [ops.from_numpy(zeros, runtime.device, runtime.precision.compute) for _ in range(2)]
            for _ in range(spec.num_hidden_layers)
        ]
