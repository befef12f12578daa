"""Generation with a key-value cache of a fixed size, written in place."""

import numpy as np
import torch

from msft.backend.torch import ops


class Session:
    """A batch being generated; see `decoding.Session`."""

    bucket = 1

    def __init__(self, model, max_new_tokens: int):
        self.decoder = model.decoder
        self.room = max_new_tokens
        self.slot = 0

    def prefill(self, input_ids: np.ndarray, padding: np.ndarray) -> np.ndarray:
        """Take left-padded prompts int32 [rows, length] with `padding` int32 [rows]; return the last logits."""
        rows, length = input_ids.shape
        positions = np.arange(length)[None, :] - padding[:, None]
        real = np.arange(length + self.room)[None, :] >= padding[:, None]
        self.real = self.decoder.tensor(real) if padding.any() else None
        self.next_positions = length - padding
        self.layers = self._empty(rows, length + self.room)
        self.weight = self.decoder.head_weight()
        return self._logits(input_ids, np.maximum(positions, 0))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take one more token for each row, int32 [rows]; return the next logits, float32 [rows, vocabulary]."""
        positions = self.next_positions[:, None]
        self.next_positions = self.next_positions + 1
        return self._logits(tokens[:, None], positions)

    @torch.inference_mode()
    def _logits(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        with self.decoder.mode(None, adapter=True):
            seen = None if self.real is None else self.real[:, : self.slot + input_ids.shape[1]]
            hidden = self.decoder.cached_hidden(input_ids, positions, seen, self)
            return ops.to_numpy(self.decoder.head(hidden, self.weight))

    def _empty(self, rows: int, capacity: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        spec, runtime = self.decoder.spec, self.decoder.runtime
        shape = (rows, spec.num_key_value_heads, capacity, spec.head_dim)
        kind = ops.dtype(runtime.precision.compute)
        return [
            tuple(torch.zeros(shape, dtype=kind, device=runtime.device) for _ in range(2))
            for _ in range(spec.num_hidden_layers)
        ]
