"""A decoder's block in compiled functions: what it keeps for its gradients, and which it computes, is chosen here."""

from dataclasses import dataclass

import mindspore
from mindspore import Tensor, mint
from mindspore import ops as operators

from msft.backend.mindspore import ops

ABSENT = -1
# Where a layer's tensors are used, by the start of their names.
BEFORE_ATTENTION = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class BatchTensors:
    """What all blocks take of a batch: the plan of its attention, rotary tables [tokens, 1, dim], dropout's keys."""

    plan: object
    cosine: Tensor
    sine: Tensor
    tokens: Tensor


def differentiable(decoder, layout, dropout: bool, adapter: bool):
    """Return one block: (batch, hidden [rows, length, hidden], *tensors in the layout's order) -> hidden.

    With `recompute` it keeps its arguments alone for the backward pass.
    """
    steps, recompute = _Steps(decoder, layout, decoder.dropout if dropout else 0.0, adapter), decoder.runtime.recompute

    class Block(mindspore.common._Function):
        @staticmethod
        def forward(context, batch, hidden, *tensors):
            output, *kept = steps.forward(batch, hidden, tensors)
            context.batch = batch
            context.save_for_backward(hidden, *tensors, *(() if recompute else kept))
            return output

        @staticmethod
        def backward(context, gradient):
            hidden, *saved = context.saved_tensors
            tensors, kept = saved[: len(layout)], saved[len(layout) :]
            if recompute:
                _, *kept = steps.forward(context.batch, hidden, tensors)
            return None, *steps.backward(context.batch, gradient, hidden, tensors, kept)

    return Block.apply


class _Steps:
    """The compiled functions before and behind a block's attention, and those of their gradients."""

    def __init__(self, decoder, layout, dropout: float, adapter: bool):
        names_of_layer = [name for name, _ in layout]
        self.front = [place for place, name in enumerate(names_of_layer) if name.startswith(BEFORE_ATTENTION)]
        self.back = [place for place in range(len(layout)) if place not in self.front]
        self.attention = decoder.kernels.segments
        front, back = ([layout[place] for place in places] for places in (self.front, self.back))
        before, behind = (_Parts(decoder, part, dropout, adapter) for part in (front, back))
        self.tuned_front = [place for place in self.front if layout[place][1]]
        self.tuned_back = [place for place in self.back if layout[place][1]]
        project, finish = before.project(), behind.finish()
        self.project, self.finish = mindspore.jit(project), mindspore.jit(finish)
        self.project_backward = mindspore.jit(_project_backward(project, [is_tuned for _, is_tuned in front]))
        self.finish_backward = mindspore.jit(_finish_backward(behind, back))

    def forward(self, batch: BatchTensors, hidden: Tensor, tensors):
        """Return the block's output and what `backward` needs."""
        front, back = ([tensors[place] for place in places] for places in (self.front, self.back))
        heads = self.project(hidden, batch.cosine, batch.sine, batch.tokens, *front)
        mixed = self.attention.forward(*heads, batch.plan)
        output, *inner = self.finish(hidden, mixed, batch.tokens, *back)
        return output, *heads, mixed, *inner

    def backward(self, batch: BatchTensors, gradient: Tensor, hidden: Tensor, tensors, kept) -> list[Tensor | None]:
        """Return the gradients of hidden and of all tensors, None for frozen ones."""
        front, back = ([tensors[place] for place in places] for places in (self.front, self.back))
        *heads, mixed, middle, gate, up = kept
        passed, by_mixed, *found = self.finish_backward(gradient, mixed, middle, gate, up, batch.tokens, *back)
        by_place = dict(zip(self.tuned_back, found, strict=True))
        by_heads = self.attention.backward(by_mixed, *heads, mixed, batch.plan)
        by_hidden, *found = self.project_backward(
            *by_heads, passed, hidden, batch.cosine, batch.sine, batch.tokens, *front
        )
        by_place |= zip(self.tuned_front, found, strict=True)
        return [by_hidden, *(by_place.get(place) for place in range(len(tensors)))]


def _project_backward(project, tuned: list[bool]):
    chosen = [place for place, is_tuned in enumerate(tuned, 4) if is_tuned]
    gradient_of = ops.gradient(project)

    def backward(by_query, by_key, by_value, passed, hidden, cosine, sine, tokens, *tensors):
        found = gradient_of(hidden, cosine, sine, tokens, *tensors, (by_query, by_key, by_value))
        results = (passed + found[0],)
        for place in chosen:
            results = results + (found[place],)
        return results

    return backward


def _finish_backward(parts: "_Parts", layout):
    merge, expand, contract = (ops.gradient(part) for part in (parts.merge(), parts.expand(), parts.contract()))
    tuned = [
        (place, name.startswith("mlp.down_proj"), name.startswith("self_attn"))
        for place, (name, is_tuned) in enumerate(layout)
        if is_tuned
    ]

    def backward(gradient, mixed, middle, gate, up, tokens, *tensors):
        by_contract = contract(middle, gate, up, tokens, *tensors, gradient)
        by_expand = expand(middle, tokens, *tensors, (by_contract[1], by_contract[2]))
        by_middle = by_contract[0] + by_expand[0]
        by_merge = merge(middle, mixed, tokens, *tensors, by_middle)
        results = (by_middle.reshape(gradient.shape), by_merge[1])
        for place, of_contract, of_merge in tuned:
            if of_contract:
                results = results + (by_contract[4 + place],)
            elif of_merge:
                results = results + (by_merge[3 + place],)
            else:
                results = results + (by_expand[2 + place],)
        return results

    return backward


def cached(decoder, layout):
    """Return one compiled block for generation, which also takes the new slots and the keys and values so far."""
    parts = _Parts(decoder, layout, 0.0, True)
    project, finish, attention = parts.project(), parts.finish(), decoder.kernels.attention

    def block(hidden, cosine, sine, allowed, slots, keys, values, *tensors):
        rows, length, _ = hidden.shape
        query, key, value = project(hidden, cosine, sine, slots, *tensors)
        query, key, value = (_by_head(part, rows, length) for part in (query, key, value))
        keys = mint.scatter(keys, 2, _spread(slots, key), key)
        values = mint.scatter(values, 2, _spread(slots, value), value)
        mixed = attention(query, keys, values, allowed).transpose(0, 2, 1, 3)
        return finish(hidden, mixed, slots, *tensors)[0], keys, values

    return mindspore.jit(block)


def _by_head(tokens, rows, length):
    """[rows x length, heads, dim] -> [rows, heads, length, dim]."""
    return tokens.reshape(rows, length, *tokens.shape[1:]).transpose(0, 2, 1, 3)


def _spread(slots, new):
    """The slot of every element of new keys or values [rows, kv_heads, length, head_dim]."""
    return operators.broadcast_to(slots.reshape(1, 1, -1, 1), new.shape)


class _Parts:
    """Writes the parts of a block for one layout; what they close over are numbers known when they are compiled.

    All take and give tokens [rows x length, ...]; `hidden` may have rows and length apart. `tensors` are the layout's.
    """

    def __init__(self, decoder, layout, dropout: float, adapter: bool):
        self.decoder = decoder
        self.spec = decoder.spec
        self.dropout = dropout
        self.adapter = adapter
        self.position = {name: position for position, (name, _) in enumerate(layout)}
        self.compute = ops.dtype(decoder.runtime.precision.compute)

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

    def norm(self, name: str):
        """(hidden, tensors) -> RMSNorm of hidden."""
        weight, rms_norm = self.position[f"{name}.weight"], self.decoder.kernels.rms_norm

        def norm(hidden, tensors):
            return rms_norm(hidden, tensors[weight])

        return norm

    def project(self):
        """(hidden, cosine, sine, tokens, *tensors) -> rotated queries and keys, values [tokens, heads, dim]."""
        norm, rotary, dim = self.norm("input_layernorm"), self.decoder.kernels.rotary, self.spec.head_dim
        linears = self.linears(*(f"self_attn.{name}_proj" for name in "qkv"))

        def project(hidden, cosine, sine, tokens, *tensors):
            normed = norm(hidden.reshape(-1, hidden.shape[-1]), tensors)
            query, key, value = linears(normed, tokens, tensors)
            query = rotary(query.reshape(-1, query.shape[-1] // dim, dim), cosine, sine)
            key = rotary(key.reshape(-1, key.shape[-1] // dim, dim), cosine, sine)
            return query, key, value.reshape(-1, value.shape[-1] // dim, dim)

        return project

    def finish(self):
        """(hidden, mixed, tokens, *tensors) -> the block's output, and the steps to it (see `merge`, `expand`)."""
        merge, expand, contract = self.merge(), self.expand(), self.contract()

        def finish(hidden, mixed, tokens, *tensors):
            middle = merge(hidden.reshape(-1, hidden.shape[-1]), mixed, tokens, *tensors)
            gate, up = expand(middle, tokens, *tensors)
            output = contract(middle, gate, up, tokens, *tensors)
            return output.reshape(hidden.shape), middle, gate, up

        return finish

    def merge(self):
        """(hidden, mixed [tokens, heads, dim], tokens, *tensors) -> hidden + attention's output projection."""
        linears = self.linears("self_attn.o_proj")

        def merge(hidden, mixed, tokens, *tensors):
            return hidden + linears(mixed.reshape(hidden.shape[0], -1), tokens, tensors)[0]

        return merge

    def expand(self):
        """(middle, tokens, *tensors) -> the gate and the up projection of the normed `middle`."""
        norm, linears = self.norm("post_attention_layernorm"), self.linears("mlp.gate_proj", "mlp.up_proj")

        def expand(middle, tokens, *tensors):
            return linears(norm(middle, tensors), tokens, tensors)

        return expand

    def contract(self):
        """(middle, gate, up, tokens, *tensors) -> middle + the down projection of SwiGLU."""
        swiglu, linears = self.decoder.kernels.swiglu, self.linears("mlp.down_proj")

        def contract(middle, gate, up, tokens, *tensors):
            return middle + linears(swiglu(gate, up), tokens, tensors)[0]

        return contract
