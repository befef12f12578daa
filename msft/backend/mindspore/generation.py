"""Generation with a key-value cache of a fixed size, so that one compiled block serves every new token."""

import numpy as np
from mindspore import Tensor

from msft.backend.mindspore import ops
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
        heads = rows * self.decoder.spec.num_key_value_heads
        self.first_places = np.arange(heads, dtype=np.int32)[:, None] * self.capacity
        self.caches = self._empty(heads * self.capacity)
        self.weight = self.decoder.head_weight()
        positions = np.arange(length)[None, :] - padding[:, None]
        return self._logits(input_ids, np.maximum(positions, 0), np.arange(length))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take one more token for each row, int32 [rows]; return the next logits, float32 [rows, vocabulary]."""
        return self._logits(tokens[:, None], (self.slot - self.padding)[:, None], np.arange(self.capacity))

    def _logits(self, input_ids: np.ndarray, positions: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """The logits of the last position; the queries see those of `slots` that are theirs."""
        queries = np.arange(self.slot, self.slot + input_ids.shape[1], dtype=np.int32)
        seen = (slots <= queries[:, None]) & (slots >= self.padding[:, None, None])
        # A padding query sees itself, so that its softmax has something to sum.
        seen |= slots == queries[:, None]
        hidden = self._hidden(input_ids, positions, seen, (self.first_places + queries).reshape(-1, 1))
        self.slot += len(queries)
        return ops.to_numpy(self.decoder.head(hidden, self.weight))

    def _hidden(self, input_ids: np.ndarray, positions: np.ndarray, seen: np.ndarray, places: np.ndarray) -> Tensor:
        """The last position's hidden states [rows, hidden]; the keys and values go into the cache at `places`."""
        decoder = self.decoder
        tables = [table[:, None] for table in rope.tables(decoder.spec, positions)]
        shared = [decoder.tensor(array) for array in (*tables, seen, places)]
        hidden = decoder.embed(decoder.parameter("model.embed_tokens.weight"), decoder.tensor(input_ids))
        for (layout, names), cache in zip(decoder.layers, self.caches, strict=True):
            apply, tensors = decoder.cached_block(layout), map(decoder.parameter, names)
            hidden = apply(hidden, *shared, *cache, *tensors)
        return decoder.norm(hidden[:, -1], decoder.parameter("model.norm.weight"))

    def _empty(self, places: int) -> list[list[Tensor]]:
        spec, runtime = self.decoder.spec, self.decoder.runtime
        zeros = np.zeros((places, spec.head_dim), np.float32)
        return [
            [ops.from_numpy(zeros, runtime.device, runtime.precision.compute) for _ in range(2)]
            for _ in range(spec.num_hidden_layers)
        ]
