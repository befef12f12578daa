"""Generation with a key-value cache of a fixed size, written in place."""

import numpy as np
import torch

from msft.backend import prefix
from msft.backend.torch import block, ops
from msft.backend.torch.cached_block import CachedBlock, Step
from msft.models import rope


class Session:
    """A batch being generated; see `decoding.Session`."""

    bucket = 1

    def __init__(self, model, max_new_tokens: int):
        self.decoder = model.decoder
        self.room = max_new_tokens
        self.slot = 0

    @torch.inference_mode()
    def prefill(self, input_ids: np.ndarray, padding: np.ndarray) -> np.ndarray:
        """Take left-padded prompts int32 [rows, length] with `padding` int32 [rows]; return the last logits."""
        rows, length = input_ids.shape
        positions = np.arange(length)[None, :] - padding[:, None]
        real = np.arange(length + self.room)[None, :] >= padding[:, None]
        self.real = self.decoder.tensor(real) if padding.any() else None
        self.next_positions = length - padding
        positions, segments = np.maximum(positions, 0).astype(np.int32), real[:, :length].astype(np.int32)
        self.turned = prefix.positions(self.decoder.spec, input_ids, positions, segments)
        open_to = padding + prefix.contexts(self.decoder.spec, input_ids, segments).max(axis=1)
        self.open_to = self.decoder.tensor(open_to) if self.decoder.spec.prefix else None
        self.blocks = self._blocks(rows, length + self.room)
        self.weight = self.decoder.head_weight()
        return self._logits(input_ids, positions)

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take one more token for each row, int32 [rows]; return the next logits, float32 [rows, vocabulary]."""
        positions = self.next_positions[:, None]
        self.next_positions = self.next_positions + 1
        self.turned = prefix.following(self.decoder.spec, self.turned[..., -1:])
        self.open_to = None
        return self._logits(tokens[:, None], positions)

    def _logits(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        decoder, (rows, length) = self.decoder, input_ids.shape
        hidden = decoder.entered(input_ids, positions)
        tables = (decoder.tensor(table).to(hidden.dtype) for table in rope.tables_by_row(decoder.spec, self.turned))
        step = Step(decoder.spec, self.slot, length, *tables, self.real, self.open_to)
        hidden = hidden.flatten(0, 1)
        for apply in self.blocks:
            hidden = apply(hidden, step)
        self.slot += length
        norm, cap = decoder.network.get_submodule(decoder.spec.outside.norm), decoder.spec.head_cap
        last = norm(hidden.view(rows, length, -1)[:, -1])
        logits = block.few_rows(last.to(self.weight.dtype), self.weight).float()
        return ops.to_numpy(logits.div(cap).tanh_().mul_(cap) if cap else logits)

    def _blocks(self, rows: int, capacity: int) -> list[CachedBlock]:
        spec, runtime = self.decoder.spec, self.decoder.runtime
        shape = (2, rows, spec.num_key_value_heads, capacity, spec.head_dim)
        kind = ops.dtype(runtime.precision.compute)
        return [
            CachedBlock(self.decoder, number, torch.zeros(shape, dtype=kind, device=runtime.device))
            for number in range(spec.num_hidden_layers)
        ]
