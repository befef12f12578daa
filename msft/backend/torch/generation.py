"""Generation with transformers' key-value cache."""

import numpy as np
import torch
from transformers import DynamicCache

from msft.backend.torch import ops


class Session:
    """A batch being generated; see `decoding.Session`."""

    bucket = 1

    def __init__(self, model, max_new_tokens: int):
        self.decoder = model.decoder
        self.cache = DynamicCache(config=model.decoder.network.config)

    def prefill(self, input_ids: np.ndarray, padding: np.ndarray) -> np.ndarray:
        """Take left-padded prompts int32 [rows, length] with `padding` int32 [rows]; return the last logits."""
        positions = np.arange(input_ids.shape[1])[None, :] - padding[:, None]
        self.real = self.decoder.tensor((positions >= 0).astype(np.int64))
        self.next_positions = input_ids.shape[1] - padding
        return self._logits(input_ids, np.maximum(positions, 0))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take one more token for each row, int32 [rows]; return the next logits, float32 [rows, vocabulary]."""
        self.real = torch.cat([self.real, self.real.new_ones(len(tokens), 1)], dim=1)
        positions = self.next_positions[:, None]
        self.next_positions = self.next_positions + 1
        return self._logits(tokens[:, None], positions)

    @torch.no_grad()
    def _logits(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        with self.decoder.mode(None, adapter=True):
            hidden = self.decoder.cached_hidden(input_ids, positions, self.real, self.cache)
            return ops.to_numpy(self.decoder.head(hidden, self.decoder.head_weight()))
