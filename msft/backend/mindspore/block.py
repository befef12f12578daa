"""A decoder's block as compiled functions that pass one tensor from each to the next, and those of its gradients.

MindSpore computes a compiled function of tensors at once, but waits by spinning, which costs a core, where functions
give several tensors, stand in its own differentiation, or have plain operators between them.
"""

from typing import NamedTuple

import mindspore
from mindspore import Tensor, mint
from mindspore import ops as operators

from msft.backend.mindspore import ops


ABSENT = -1


class LineTensors(NamedTuple):
    """What all blocks take of a line: rotary tables [length, 1, dim], dropout's keys int32 [length], attention's plan."""

    cosine: Tensor
    sine: Tensor
    tokens: Tensor
    plan: tuple


class Kept(NamedTuple):
    """What a block's backward pass needs: its input, and what it makes of it before its output (None: make it again)."""

    hidden: Tensor
    inner: tuple[Tensor, ...] | None


class Block:
    """One block of a layout, (name, tuned or not) for each of its tensors, which the methods take in this order."""

    def __init__(self, decoder, layout, dropout: float, adapter: bool):
        parts = _Parts(decoder, layout, dropout, adapter)
        self.attention, self.recompute = decoder.kernels.attention, decoder.runtime.recompute
        self.project = _Step(parts.project(), ("input_layernorm", *_modules("self_attn", "q k v")), layout)
        self.merge = _Step(parts.merge(), ("self_attn.o_proj",), layout)
        self.expand = _Step(parts.expand(), ("post_attention_layernorm", *_modules("mlp", "gate up")), layout)
        self.contract = _Step(parts.contract(), ("mlp.down_proj",), layout)

    def forward(self, hidden: Tensor, line: LineTensors, tensors: list[Tensor]) -> tuple[Tensor, Kept]:
        """Return the output for hidden states [length, hidden], and what `backward` needs."""
        inner = self._inner(hidden, line, tensors)
        _, _, middle, wide = inner
        output = self.contract.forward(wide, line, tensors, onto=middle)
        return output, Kept(hidden, None if self.recompute else inner)

    def backward(self, gradient: Tensor, kept: Kept, line: LineTensors, tensors: list[Tensor]):
        """Return the gradient of the input for that of the output, and the tuned tensors' by their place."""
        hidden = kept.hidden
        heads, mixed, middle, wide = kept.inner or self._inner(hidden, line, tensors)
        by_wide = self.contract.backward(gradient, wide, line, tensors)
        by_middle = self.expand.backward(by_wide, middle, line, tensors, onto=gradient)
        by_mixed = self.merge.backward(by_middle, mixed, line, tensors)
        by_heads = self.attention.backward(by_mixed, heads, mixed, *line.plan)
        by_hidden = self.project.backward(by_heads, hidden, line, tensors, onto=by_middle)
        found = self.contract.tuned_gradients(gradient, wide, line, tensors)
        found |= self.expand.tuned_gradients(by_wide, middle, line, tensors)
        found |= self.merge.tuned_gradients(by_middle, mixed, line, tensors)
        found |= self.project.tuned_gradients(by_heads, hidden, line, tensors)
        return by_hidden, found

    def _inner(self, hidden, line, tensors):
        heads = self.project.forward(hidden, line, tensors)
        mixed = self.attention.forward(heads, *line.plan)
        middle = self.merge.forward(mixed, line, tensors, onto=hidden)
        return heads, mixed, middle, self.expand.forward(middle, line, tensors)


def _modules(parent: str, words: str) -> list[str]:
    return [f"{parent}.{word}_proj" for word in words.split()]


class _Step:
    """A function (values, cosine, sine, tokens, *all tensors) of a block and its gradients, each compiled when used.

    Of the tensors it reads those whose names start with `starts`.
    """

    def __init__(self, function, starts: tuple[str, ...], layout):
        self.tuned = tuple(place for place, (name, tuned) in enumerate(layout) if tuned and name.startswith(starts))
        self.apply, self.apply_onto = (mindspore.jit(made) for made in _forward(function))
        self.differentiate, self.differentiate_onto = (mindspore.jit(made) for made in _backward(function))
        self.differentiate_tuned = mindspore.jit(_backward_tuned(function, self.tuned))

    def forward(self, values: Tensor, line: LineTensors, tensors, onto: Tensor | None = None) -> Tensor:
        """Return the function's result, added to `onto`."""
        if onto is None:
            return self.apply(values, *line[:3], *tensors)
        return self.apply_onto(onto, values, *line[:3], *tensors)

    def backward(self, gradient: Tensor, values: Tensor, line: LineTensors, tensors, onto: Tensor | None = None):
        """Return the gradient of `values` for that of the result, added to `onto`."""
        if onto is None:
            return self.differentiate(gradient, values, *line[:3], *tensors)
        return self.differentiate_onto(onto, gradient, values, *line[:3], *tensors)

    def tuned_gradients(self, gradient: Tensor, values: Tensor, line: LineTensors, tensors) -> dict[int, Tensor]:
        """Return the gradients of the tuned tensors one after another in a flat tensor, by their places; or nothing."""
        if not self.tuned:
            return {}
        return {self.tuned: self.differentiate_tuned(gradient, values, *line[:3], *tensors)}


def _forward(function):
    def forward(values, cosine, sine, tokens, *tensors):
        return function(values, cosine, sine, tokens, *tensors)

    def forward_onto(onto, values, cosine, sine, tokens, *tensors):
        return onto + function(values, cosine, sine, tokens, *tensors)

    return forward, forward_onto


def _backward(function):
    gradient_of = ops.gradient(function)

    def backward(gradient, values, cosine, sine, tokens, *tensors):
        return gradient_of(values, cosine, sine, tokens, *tensors, gradient)[0]

    def backward_onto(onto, gradient, values, cosine, sine, tokens, *tensors):
        return onto + gradient_of(values, cosine, sine, tokens, *tensors, gradient)[0]

    return backward, backward_onto


def _backward_tuned(function, tuned):
    gradient_of, places = ops.gradient(function), tuple(4 + place for place in tuned)

    def backward_tuned(gradient, values, cosine, sine, tokens, *tensors):
        found = gradient_of(values, cosine, sine, tokens, *tensors, gradient)
        results = ()
        for place in places:
            results = results + (found[place].reshape(-1),)
        return operators.concat(results)

    return backward_tuned


def cached(decoder, layout):
    """Return one compiled block for generation.

    It takes hidden states [rows, length, hidden], rotary tables [rows x length, 1, dim], which slots each new position
    sees, bool [rows, length, capacity], the new positions' slots, the keys and values so far [rows, kv_heads, capacity,
    dim], and the layout's tensors; it returns hidden states, keys and values.
    """
    parts, spec = _Parts(decoder, layout, 0.0, True), decoder.spec
    project, merge, expand, contract = parts.project(), parts.merge(), parts.expand(), parts.contract()
    attention, dim = decoder.kernels.cached_attention, spec.head_dim
    first, second = spec.num_attention_heads, spec.num_attention_heads + spec.num_key_value_heads

    def block(hidden, cosine, sine, allowed, slots, keys, values, *tensors):
        rows, length, features = hidden.shape
        flat = hidden.reshape(-1, features)
        heads = project(flat, cosine, sine, slots, *tensors).reshape(rows, length, -1, dim).transpose(0, 2, 1, 3)
        keys = _store(keys, heads[:, first:second], slots)
        values = _store(values, heads[:, second:], slots)
        mixed = attention(heads[:, :first], keys, values, allowed).transpose(0, 2, 1, 3).reshape(rows * length, -1)
        middle = flat + merge(mixed, cosine, sine, slots, *tensors)
        wide = expand(middle, cosine, sine, slots, *tensors)
        return (middle + contract(wide, cosine, sine, slots, *tensors)).reshape(hidden.shape), keys, values

    return mindspore.jit(block)


def _store(held, new, slots):
    """Held keys or values with new ones [rows, kv_heads, length, dim] in their slots."""
    return mint.scatter(held, 2, operators.broadcast_to(slots.reshape(1, 1, -1, 1), new.shape), new)


class _Parts:
    """Writes the parts for one layout; what they close over are numbers known when they are compiled.

    Each is (values [tokens, ...], cosine, sine, tokens, *tensors of the layout) -> [tokens, ...].
    """

    def __init__(self, decoder, layout, dropout: float, adapter: bool):
        self.decoder = decoder
        self.spec = decoder.spec
        self.dropout = dropout
        self.adapter = adapter
        self.position = {name: position for position, (name, _) in enumerate(layout)}
        self.compute = ops.dtype(decoder.runtime.precision.compute)

    def project(self):
        """Hidden states -> queries and keys, rotated, and values [tokens, (heads + 2 kv_heads) x dim]."""
        norm, rotary, dim = self.norm("input_layernorm"), self.decoder.kernels.rotary, self.spec.head_dim
        linears = self.linears(*(f"self_attn.{name}_proj" for name in "qkv"))

        def project(hidden, cosine, sine, tokens, *tensors):
            query, key, value = linears(norm(hidden, tensors), tokens, tensors)
            query = rotary(query.reshape(-1, query.shape[-1] // dim, dim), cosine, sine).reshape(query.shape)
            key = rotary(key.reshape(-1, key.shape[-1] // dim, dim), cosine, sine).reshape(key.shape)
            return operators.concat((query, key, value), 1)

        return project

    def merge(self):
        """What attention gives, mixed values [tokens, heads x dim] first -> its output projection."""
        linears, features = self.linears("self_attn.o_proj"), self.spec.num_attention_heads * self.spec.head_dim

        def merge(mixed, cosine, sine, tokens, *tensors):
            # A slice that takes everything costs ten times the copy that it is on CPU.
            values = mixed if mixed.shape[1] == features else mixed[:, :features]
            return linears(values, tokens, tensors)[0]

        return merge

    def expand(self):
        """Hidden states -> the gate and the up projection of their norm, side by side."""
        norm, linears = self.norm("post_attention_layernorm"), self.linears("mlp.gate_proj", "mlp.up_proj")

        def expand(hidden, cosine, sine, tokens, *tensors):
            return operators.concat(linears(norm(hidden, tensors), tokens, tensors), 1)

        return expand

    def contract(self):
        """What `expand` gives -> the down projection of its SwiGLU."""
        swiglu, linears = self.decoder.kernels.swiglu, self.linears("mlp.down_proj")

        def contract(wide, cosine, sine, tokens, *tensors):
            gate, up = operators.split(wide, wide.shape[1] // 2, 1)
            return linears(swiglu(gate, up), tokens, tensors)[0]

        return contract

    def norm(self, name: str):
        """(hidden, tensors) -> RMSNorm of hidden."""
        weight, rms_norm = self.position[f"{name}.weight"], self.decoder.kernels.rms_norm

        def norm(hidden, tensors):
            return rms_norm(hidden, tensors[weight])

        return norm

    def linears(self, *modules: str):
        """(hidden, tokens, tensors) -> of each module W hidden + bias + scaling x B A dropout(hidden), as a tuple."""
        adapted = [module for module in modules if self.adapter and self._place(module, "lora_A.weight") != ABSENT]
        reduce, compute = self._reduce(adapted), self.compute
        linears = tuple(
            self._linear(module, adapted.index(module) if module in adapted else ABSENT) for module in modules
        )

        def together(hidden, tokens, tensors):
            hidden = hidden.astype(compute)
            reduced = reduce(hidden, tokens, tensors)
            results = ()
            for linear in linears:
                results = results + (linear(hidden, reduced, tensors),)
            return results

        return together

    def _place(self, module: str, leaf: str) -> int:
        return self.position.get(f"{module}.{leaf}", ABSENT)

    def _linear(self, module: str, number: int):
        """(hidden, reduced, tensors) -> one module's result, `number` being the place of its adapter in `reduced`."""
        weight, bias, lora_b = (self._place(module, leaf) for leaf in ("weight", "bias", "lora_B.weight"))

        def linear(hidden, reduced, tensors):
            result = ops.linear(hidden, tensors[weight])
            if bias != ABSENT:
                result = result + tensors[bias].astype(hidden.dtype)
            if number != ABSENT:
                result = result + ops.linear(reduced[number], tensors[lora_b])
            return result

        return linear

    def _reduce(self, modules: list[str]):
        """(hidden, tokens, tensors) -> scaling x A dropout(hidden) of each module, as a tuple."""
        places = tuple((self._place(module, "lora_A.weight"), self._place(module, "features")) for module in modules)
        dropout, scaling = self.dropout, self.decoder.scaling

        def apart(hidden, tokens, tensors):
            results = ()
            for lora_a, features in places:
                kept = ops.dropout(hidden, tokens, tensors[features], dropout) if dropout > 0 else hidden
                results = results + (ops.linear(kept, tensors[lora_a]) * scaling,)
            return results

        def joined(hidden, tokens, tensors):
            factors = ()
            for lora_a, _ in places:
                factors = factors + (tensors[lora_a],)
            reduced = ops.linear(hidden, operators.concat(factors)) * scaling
            return operators.split(reduced, tensors[places[0][0]].shape[0], 1)

        return joined if len(places) > 1 and not dropout else apart
