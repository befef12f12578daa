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
        self.padding = padding
        self.layers = self._empty(rows, length + self.room)
        positions = np.arange(length)[None, :] - padding[:, None]
        return self._logits(input_ids, np.maximum(positions, 0))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take one more token for each row, int32 [rows]; return the next logits, float32 [rows, vocabulary]."""
        return self._logits(tokens[:, None], (self.slot - self.padding)[:, None])

    def _logits(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        slots = np.arange(self.layers[0][0].shape[2])
        queries = np.arange(self.slot, self.slot + input_ids.shape[1])
        seen = (slots <= queries[:, None]) & (slots >= self.padding[:, None, None])
        # A padding query sees itself, so that its softmax has something to sum.
        seen |= slots == queries[:, None]
        with self.decoder.mode(None, adapter=True):
            hidden = self._hidden(input_ids, positions, self.decoder.tensor(seen))
            return ops.to_numpy(self.decoder.head(hidden, self.decoder.head_weight()))

    def _hidden(self, input_ids: np.ndarray, positions: np.ndarray, seen: Tensor) -> Tensor:
        """The last position's hidden states [rows, hidden]; its keys and values go into the cache."""
        decoder, length = self.decoder, input_ids.shape[1]
        cosine, sine = map(decoder.tensor, (table[:, None] for table in rope.tables(decoder.spec, positions)))
        hidden = decoder.embed(decoder.parameter("model.embed_tokens.weight"), decoder.tensor(input_ids))
        slots = decoder.tensor(np.arange(self.slot, self.slot + length, dtype=np.int32))
        for number, (layout, names) in enumerate(decoder.layers):
            apply, tensors = decoder.cached_block(layout), map(decoder.parameter, names)
            hidden, *self.layers[number] = apply(hidden, cosine, sine, seen, slots, *self.layers[number], *tensors)
        self.slot += length
        return decoder.norm(hidden[:, -1], decoder.parameter("model.norm.weight"))

    def _empty(self, rows: int, capacity: int) -> list[list[Tensor]]:
        spec, runtime = self.decoder.spec, self.decoder.runtime
        zeros = np.zeros((rows, spec.num_key_value_heads, capacity, spec.head_dim), np.float32)
        return [
            [ops.from_numpy(zeros, runtime.device, runtime.precision.compute) for _ in range(2)]
            for _ in range(spec.num_hidden_layers)
        ]
