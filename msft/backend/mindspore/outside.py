"""What stands before and behind a decoder's layers: embedding, learned positions, norms; and their gradients."""

from functools import cache
from types import SimpleNamespace

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend.line import Line
from msft.backend.mindspore import ops


class Norm:
    """A norm outside the layers, by its name; `decoder` has its tensors."""

    def __init__(self, decoder, name: str):
        self.decoder, self.names = decoder, [f"{name}.weight"]
        if decoder.spec.norm == "layer":
            self.names.append(f"{name}.bias")
        self.functions = _norm_functions(decoder.kernels.normed)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the norm of hidden states [length, hidden]."""
        return self.functions.forward(hidden, *self._tensors())

    def backward(self, gradient: Tensor, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradients of hidden states, and of tuned tensors by canonical name."""
        arguments, tuned = (gradient, hidden, *self._tensors()), self.decoder.tuned_names
        by_tensor = (self.functions.by_weight, self.functions.by_bias)
        found = {
            tuned[name]: differentiate(*arguments)
            for name, differentiate in zip(self.names, by_tensor, strict=False)
            if name in tuned
        }
        return self.functions.by_hidden(*arguments), found

    def _tensors(self) -> list[Tensor]:
        return [self.decoder.parameter(name) for name in self.names]


class Entrance:
    """From a line's tokens to the hidden states before the first layer, [length, hidden] of this rank's tokens."""

    def __init__(self, decoder):
        self.decoder, spec = decoder, decoder.spec
        self.functions = _table_functions(spec.embedding_scale)
        self.positions = f"{spec.outside.positions}.weight" if spec.outside.positions else ""
        self.first = spec.outside.first_position
        self.norm = Norm(decoder, spec.outside.embedding_norm) if spec.outside.embedding_norm else None

    def forward(self, found: Line) -> Tensor:
        """Return the hidden states."""
        hidden = self._summed(found)
        return hidden if self.norm is None else self.norm.forward(hidden)

    def of(self, input_ids: np.ndarray, position_ids: np.ndarray) -> Tensor:
        """Return the hidden states [..., hidden] of tokens that are no line, for a model that is not cut."""
        decoder = self.decoder
        hidden = self.functions.embed(decoder.parameter(decoder.spec.embedding), decoder.tensor(input_ids))
        if self.positions:
            hidden = hidden + self._position_rows(position_ids)
        if self.norm is None:
            return hidden
        return self.norm.forward(hidden.reshape(-1, hidden.shape[-1])).reshape(hidden.shape)

    def backward(self, gradient: Tensor, found: Line) -> dict[str, Tensor]:
        """Return the gradients of tuned tensors by canonical name, for that of the hidden states."""
        decoder, gradients = self.decoder, {}
        tuned = decoder.tuned_names
        if self.norm is not None:
            gradient, gradients = self.norm.backward(gradient, self._summed(found))
        if self.positions in tuned:
            rows = decoder.tensor(found.position_ids + np.int32(self.first))
            table = decoder.parameter(self.positions)
            gradients[tuned[self.positions]] = self.functions.rows_backward(gradient, rows, table)
        if decoder.spec.embedding in tuned:
            gradients[tuned[decoder.spec.embedding]] = self._by_embedding(gradient, found)
        return gradients

    def _summed(self, found: Line) -> Tensor:
        """The embedding of this rank's tokens, with that of their positions."""
        decoder = self.decoder
        table = decoder.parameter(decoder.spec.embedding)
        if decoder.vocabulary:
            return decoder.leave(decoder.vocabulary.embed(table, decoder.tensor(found.input_ids)))
        hidden = self.functions.embed(table, self._own_ids(found))
        return hidden + self._position_rows(found.position_ids) if self.positions else hidden

    def _position_rows(self, position_ids: np.ndarray) -> Tensor:
        table = self.decoder.parameter(self.positions)
        return self.functions.rows(table, self.decoder.tensor(position_ids + np.int32(self.first)))

    def _by_embedding(self, gradient: Tensor, found: Line) -> Tensor:
        decoder = self.decoder
        table = decoder.parameter(decoder.spec.embedding)
        if decoder.vocabulary:
            tokens = decoder.tensor(found.input_ids)
            return decoder.vocabulary.embed_backward(decoder.enter(gradient), tokens, table)
        return self.functions.embed_backward(gradient, self._own_ids(found), table)

    def _own_ids(self, found: Line) -> Tensor:
        return self.decoder.tensor(found.input_ids[self.decoder.mesh.own_tokens(len(found.input_ids))])


@cache
def _norm_functions(normed):
    """Compiled once in a process for every norm of a kind."""
    gradient_of = ops.gradient(normed)

    def by_hidden(gradient, *arguments):
        return gradient_of(*arguments, gradient)[0]

    def by_weight(gradient, *arguments):
        return gradient_of(*arguments, gradient)[1]

    def by_bias(gradient, *arguments):
        return gradient_of(*arguments, gradient)[2]

    functions = {"forward": normed, "by_hidden": by_hidden, "by_weight": by_weight, "by_bias": by_bias}
    return SimpleNamespace(**{name: mindspore.jit(function) for name, function in functions.items()})


@cache
def _table_functions(scale: float):
    def embed(table, input_ids):
        hidden = operators.gather(table, input_ids, 0)
        return hidden * scale if scale != 1 else hidden

    def rows(table, numbers):
        return operators.gather(table, numbers, 0)

    def embed_backward(gradient, input_ids, table):
        found = operators.unsorted_segment_sum(gradient.astype(table.dtype), input_ids, table.shape[0])
        return found * scale if scale != 1 else found

    def rows_backward(gradient, numbers, table):
        return operators.unsorted_segment_sum(gradient.astype(table.dtype), numbers, table.shape[0])

    functions = {"embed": embed, "rows": rows, "embed_backward": embed_backward, "rows_backward": rows_backward}
    return SimpleNamespace(**{name: mindspore.jit(function) for name, function in functions.items()})
