"""Generation by an encoder-decoder: prompts are encoded once, and answers decoded token by token with caches."""

import numpy as np
import torch

from msft.backend import seq2seq
from msft.backend.torch import block, ops
from msft.backend.torch.relative_attention import mixed


class EncoderSession:
    """A batch being generated; see `decoding.Session`."""

    bucket = 1

    def __init__(self, model, max_new_tokens: int):
        self.decoder = model.decoder
        self.capacity = max_new_tokens
        self.slot = 0

    @torch.inference_mode()
    def prefill(self, input_ids: np.ndarray, padding: np.ndarray) -> np.ndarray:
        """Take left-padded prompts int32 [rows, length] with `padding` int32 [rows]; return the first logits."""
        decoder, spec, runtime = self.decoder, self.decoder.spec, self.decoder.runtime
        self.rows, self.weight = len(padding), decoder.head_weight()
        sides = seq2seq.sources(input_ids, padding)
        with decoder.autocast():
            states = decoder.encoded(sides)[0].split(sides.source.lengths())
            padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
            self.told = [
                [decoder.heads(spec.layer(number), module, padded) for module in spec.encoder.cross.states]
                for number in range(spec.num_hidden_layers)
            ]
        lengths = decoder.tensor(np.array(sides.source.lengths()))
        slots = torch.arange(padded.shape[1], device=lengths.device)
        hidden = torch.zeros(self.rows, 1, 1, len(slots), device=lengths.device)
        self.hidden_sources = hidden.masked_fill_((slots >= lengths[:, None])[:, None, None], float("-inf"))
        shape = (spec.num_hidden_layers, 2, self.rows, spec.num_attention_heads, self.capacity, spec.head_dim)
        self.cache = torch.zeros(shape, dtype=ops.dtype(runtime.precision.compute), device=runtime.device)
        self.table = decoder.parameter(f"{spec.layer(0)}{spec.encoder.positions.module}.weight")
        return self.decode(np.full(self.rows, spec.encoder.start_id, np.int32))

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take one more token for each row, int32 [rows]; return the next logits, float32 [rows, vocabulary]."""
        decoder, spec = self.decoder, self.decoder.spec
        distance = np.arange(self.slot + 1) - self.slot
        buckets = decoder.tensor(spec.encoder.positions.bucket(distance, is_causal=True)).long()
        bias = self.table[buckets].t()[None, :, None]
        with decoder.autocast():
            hidden = decoder.entered(tokens[:, None], np.zeros((self.rows, 1), np.int32))
            for number in range(spec.num_hidden_layers):
                hidden = self._layer(number, hidden, bias)
            last = decoder.network.get_submodule(spec.outside.norm)(hidden[:, -1]) * spec.encoder.output_scale
        self.slot += 1
        return ops.to_numpy(block.few_rows(last.to(self.weight.dtype), self.weight).float())

    def _layer(self, number: int, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The output of a layer for a token of each row, whose keys and values go into the cache."""
        decoder, spec = self.decoder, self.decoder.spec
        prefix, form, cross = spec.layer(number), spec.block, spec.encoder.cross
        normed = decoder.normed(prefix, form.attention_norm, hidden)
        query, key, value = (decoder.heads(prefix, module, normed) for module in form.project)
        keys, values = self.cache[number, :, :, :, : self.slot + 1]
        keys[:, :, -1:], values[:, :, -1:] = key, value
        hidden = decoder.attended(prefix, form.merge, hidden, mixed(query.to(keys.dtype), keys, values, bias))
        query = decoder.heads(prefix, cross.query, decoder.normed(prefix, cross.norm, hidden))
        hidden = decoder.attended(prefix, cross.merge, hidden, mixed(query, *self.told[number], self.hidden_sources))
        return decoder.fed_forward(prefix, form, hidden)
