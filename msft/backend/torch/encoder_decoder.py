"""transformers' encoder-decoder (T5), walked on two lines of tokens: sources and targets, each segment by itself."""

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from msft.backend import seq2seq
from msft.backend.contract import Batch, Runtime, Tuning
from msft.backend.torch import ops, replaced
from msft.backend.torch.decoder import Decoder
from msft.backend.torch.model import Model
from msft.backend.torch.relative_attention import CrossAttention, RelativeAttention
from msft.models.spec import Block, ModelSpec

# Called with the name of a module, its output [1, tokens, hidden] and the side that is of.
Seen = Callable[[str, torch.Tensor, seq2seq.Side], None]


class EncoderDecoder(Decoder):
    """Weights on the device and the way through them, as `Decoder` has them."""

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime, kernels: ops.Kernels):
        super().__init__(spec, source, tuning, runtime, kernels)
        seq2seq.check_whole(self.mesh, self.is_sharded)
        encoder, adapted = spec.encoder, tuning.lora.modules if tuning.lora else ()
        # Whether what a module with an adapter reads is of the sources.
        self.read_sources = [
            name.startswith(f"{encoder.layers}.") or name.endswith(encoder.cross.states) for name in adapted
        ]

    def hidden(self, sides: seq2seq.Split, seen: Seen | None = None) -> torch.Tensor:
        """Return what the head takes [rows, length, hidden] of a batch, 0 where no target stands.

        `seen` is called with what each module gives.
        """
        seen, spec = seen or _not_seen, self.spec
        self._count_sides(sides)
        with self.autocast():
            states = self.encoded(sides, seen)
            hidden = self._entered_side(sides.batch, sides.target, seen)
            attend = self.attention_of(sides.target, is_causal=True)
            read = CrossAttention(sides.target, sides.source)
            for number in range(spec.num_hidden_layers):
                arguments = spec.layer(number), spec.block, hidden, attend, read, states
                hidden = self._maybe_again(self._layer, *arguments)
                seen(spec.layer(number).removesuffix("."), hidden, sides.target)
            hidden = self.network.get_submodule(spec.outside.norm)(hidden)
        seen(spec.outside.norm, hidden, sides.target)
        scaled = hidden * spec.encoder.output_scale
        return self._padded(scaled, sides.target.places, sides.batch.segment_ids.shape)

    def encoded(self, sides: seq2seq.Split, seen: Seen | None = None) -> torch.Tensor:
        """Return the encoder's hidden states of the sources [1, tokens, hidden], behind its norm."""
        encoder, seen = self.spec.encoder, seen or _not_seen
        hidden = self._entered_side(sides.batch, sides.source, seen)
        attend = self.attention_of(sides.source, is_causal=False)
        for number in range(encoder.num_hidden_layers):
            hidden = self._maybe_again(self._layer, encoder.layer(number), encoder.block, hidden, attend)
            seen(encoder.layer(number).removesuffix("."), hidden, sides.source)
        states = self.network.get_submodule(encoder.norm)(hidden)
        seen(encoder.norm, states, sides.source)
        return states

    @torch.no_grad()
    def states(self, sides: seq2seq.Split) -> dict[str, torch.Tensor]:
        """Return the output of the embedding, of each block and of the norms, [rows, length, hidden], by name.

        The encoder's stand at sources, the decoder's at targets, the embedding's at both.
        """
        found: dict[str, torch.Tensor] = {}

        def seen(name, hidden, side):
            placed = self._padded(hidden, side.places, sides.batch.segment_ids.shape)
            found[name] = found[name] + placed if name in found else placed

        self.hidden(sides, seen)
        return found

    def attention_of(self, side: seq2seq.Side, is_causal: bool) -> RelativeAttention:
        """Return the attention of a side of a batch within the decoder, which is causal, or the encoder."""
        positions, first = self.spec.encoder.positions, (self.spec if is_causal else self.spec.encoder).layer(0)
        table = self.parameter(f"{first}{positions.module}.weight")
        return RelativeAttention(positions, side, table, is_causal)

    def heads(self, prefix: str, module: str, hidden: torch.Tensor) -> torch.Tensor:
        """Return what a module gives for hidden states [rows, tokens, hidden], [rows, heads, tokens, head_dim]."""
        found = self.network.get_submodule(prefix + module)(hidden)
        return found.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def attended(self, prefix: str, merge: str, hidden: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Return hidden states with what a layer's attention gives for mixed values of heads."""
        return hidden + self.network.get_submodule(prefix + merge)(mixed.transpose(1, 2).flatten(2))

    def normed(self, prefix: str, norm: str, hidden: torch.Tensor) -> torch.Tensor:
        """Return a layer's norm of hidden states."""
        return self.network.get_submodule(prefix + norm)(hidden)

    def fed_forward(self, prefix: str, form: Block, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden states behind a layer's feed-forward."""
        normed, activate = self.normed(prefix, form.feed_norm, hidden), replaced.ACTIVATIONS[form.activation]
        wide = [self.network.get_submodule(prefix + name)(normed) for name in form.expand]
        wide = activate(wide[0]) * wide[1] if form.is_gated else activate(wide[0])
        return hidden + self.network.get_submodule(prefix + form.contract)(wide)

    def _layer(self, prefix, form, hidden, attend, read=None, states=None):
        """The output of a layer, which reads the encoder's `states` where there are any."""
        normed = self.normed(prefix, form.attention_norm, hidden)
        mixed = attend(*(self.heads(prefix, module, normed) for module in form.project))
        hidden = self.attended(prefix, form.merge, hidden, mixed)
        if read is not None:
            cross = self.spec.encoder.cross
            query = self.heads(prefix, cross.query, self.normed(prefix, cross.norm, hidden))
            mixed = read(query, *(self.heads(prefix, module, states) for module in cross.states))
            hidden = self.attended(prefix, cross.merge, hidden, mixed)
        return self.fed_forward(prefix, form, hidden)

    def _maybe_again(self, layer: Callable, *arguments):
        if self.runtime.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def _entered_side(self, batch: Batch, side: seq2seq.Side, seen: Seen) -> torch.Tensor:
        hidden = self.entered(batch.input_ids.reshape(1, -1)[:, side.places], side.positions()[None])
        seen(self.spec.outside.embedding, hidden, side)
        return hidden

    def _count_sides(self, sides: seq2seq.Split) -> None:
        """Count the adapters' dropout by the tokens that each of them reads."""
        if self.dropout_keys is None:
            return
        flat = self.dropout_keys.reshape(1, -1)
        target, source = (self.tensor(flat[:, side.places]) for side in (sides.target, sides.source))
        for layer, reads_source in zip(self.adapted_layers, self.read_sources, strict=True):
            layer.dropout_tokens = source if reads_source else target


class EncoderDecoderModel(Model):
    """An encoder-decoder and its losses."""

    decoder_kind = EncoderDecoder

    @torch.no_grad()
    def activations(self, batch: Batch, adapter: bool) -> dict[str, np.ndarray]:
        """Return the hidden states by module in the order of the forward pass, float32 [rows, length, hidden]."""
        with self.decoder.mode(None, adapter):
            states = self.decoder.states(seq2seq.split(batch))
            return {name: ops.to_numpy(state) for name, state in states.items()}

    def describe(self) -> dict[str, str]:
        """Say what was applied."""
        name = "scaled_dot_product_attention, segment by segment, with relative positions"
        own = {"attention": name, "softmax": "float32 inside scaled_dot_product_attention"}
        return {**super().describe(), **own, **seq2seq.overflow(self.runtime.precision)}

    def _hidden(self, batch: Batch, taken: torch.Tensor | None = None) -> torch.Tensor:
        return self.decoder.hidden(seq2seq.split(batch))


def _not_seen(name: str, hidden: torch.Tensor, side: seq2seq.Side) -> None:
    """What a forward pass calls that nobody looks at."""
