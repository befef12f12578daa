"""The parts of a decoder's block as functions of tensors, written for one layout; `block` compiles them."""

from typing import NamedTuple

from mindspore import ops as operators

from msft.backend import slices
from msft.backend.mindspore import ops
from msft.backend.mindspore.attention import Scores
from msft.models import spec
from msft.models.experts import Experts

ABSENT = -1


class Form(NamedTuple):
    """How a family's blocks are made: of which modules, what becomes of attention's scores, which experts there are."""

    block: spec.Block
    scores: Scores
    experts: Experts | None = None


class Numbers(NamedTuple):
    """What the functions of a block are compiled for, beside its layout; blocks of equal numbers share them.

    Heads are a rank's own; of the ranks of a model one has `adds_bias`, of the modules that are cut by their inputs.
    """

    kernels: ops.Kernels
    form: Form
    heads: int
    kv_heads: int
    dim: int
    compute: str
    scaling: float
    dropout: float
    adapter: bool
    is_turned: bool
    adds_bias: bool = True


class Parts:
    """Writes the parts for one layout; what they close over are numbers known when they are compiled.

    Each is (values [tokens, ...], dropout's keys, *tensors of the layout) -> [tokens, ...].
    """

    def __init__(self, numbers: Numbers, layout):
        self.numbers, self.block = numbers, numbers.form.block
        self.position = {name: position for position, (name, _) in enumerate(layout)}
        self.compute = ops.dtype(numbers.compute)

    def project(self):
        """Hidden states -> queries, keys and values, not turned yet [tokens, (heads + 2 kv_heads) x dim]."""
        heads_of = self.normed_linear(self.block.attention_norm, self.block.project)
        ungrouped, normed = self.ungrouped(), self.normed_heads()

        def project(hidden, tokens, *tensors):
            return normed(ungrouped(heads_of(hidden, tokens, *tensors)), *tensors)

        return project if self.block.is_grouped or self.block.head_norms else heads_of

    def merge(self):
        """Attention's mixed values [tokens, heads x dim] -> its output projection."""
        return self.linear_normed([self.block.merge], self.block.merged_norm)

    def expand(self):
        """Hidden states -> the gate and the up projection of their norm, side by side."""
        return self.normed_linear(self.block.feed_norm, self.block.expand)

    def first_norm(self):
        """Hidden states -> what `project` reads where that has no norm."""
        return self.norm_alone(self.block.attention_norm)

    def second_norm(self):
        """Hidden states -> what `expand` reads where that has no norm."""
        return self.norm_alone(self.block.feed_norm)

    def contract(self):
        """What `expand` gives -> the down projection of what its gate lets through."""
        kernels, linear = self.numbers.kernels, self.linear_normed([self.block.contract], self.block.contracted_norm)

        def contract(wide, tokens, *tensors):
            return linear(kernels.activated(wide), tokens, *tensors)

        def contract_gated(wide, tokens, *tensors):
            gate, up = operators.split(wide, wide.shape[1] // 2, 1)
            return linear(kernels.gated(gate, up), tokens, *tensors)

        return contract_gated if self.block.is_gated else contract

    def shared(self):
        """What experts read -> what the expert of all tokens gives, times its gate's share."""
        experts, gated = self.numbers.form.experts, self.numbers.kernels.gated
        expand, contract = self.linear(experts.shared_expand), self.linear([experts.shared_contract])
        gate_of, width = self.linear([experts.shared_gate]), experts.shared_width

        def shared(normed, tokens, *tensors):
            gate, up = operators.split(expand(normed, tokens, *tensors), width, 1)
            found = contract(gated(gate, up), tokens, *tensors)
            return operators.sigmoid(gate_of(normed, tokens, *tensors)) * found

        return shared

    def ungrouped(self):
        """Heads by key head (its queries, the key, the value) -> all queries, all keys, all values."""
        groups, dim, is_grouped = self.numbers.kv_heads, self.numbers.dim, self.block.is_grouped
        group = self.numbers.heads // groups

        def ungrouped(heads):
            if not is_grouped:
                return heads
            count = heads.shape[0]
            parts = operators.split(heads.reshape(count, groups, (group + 2) * dim), (group * dim, dim, dim), 2)
            flat = ()
            for part in parts:
                flat = flat + (part.reshape(count, -1),)
            return operators.concat(flat, 1)

        return ungrouped

    def normed_heads(self):
        """Heads side by side -> the same with queries and keys normed, each head by itself."""
        names, dim = self.block.head_norms, self.numbers.dim
        sizes = self.numbers.heads * dim, self.numbers.kv_heads * dim, self.numbers.kv_heads * dim
        norms = [self.norm(name) for name in names]

        def normed_heads(heads, *tensors):
            if not names:
                return heads
            query, key, value = operators.split(heads, sizes, 1)
            query = norms[0](query.reshape(-1, dim), *tensors).reshape(query.shape)
            key = norms[1](key.reshape(-1, dim), *tensors).reshape(key.shape)
            return operators.concat((query, key, value), 1)

        return normed_heads

    def linear_normed(self, modules, norm: str):
        """`linear`, and where there is one, the norm of what it gives."""
        linear = self.linear(modules)
        if not norm:
            return linear
        normed = self.norm(norm)

        def linear_normed(hidden, tokens, *tensors):
            return normed(linear(hidden, tokens, *tensors), *tensors)

        return linear_normed

    def normed_linear(self, norm: str, modules):
        """`linear` of the norm of its input, or of its input where the norm stands apart."""
        if f"{norm}.weight" not in self.position:
            return self.linear(modules)
        normed, linear = self.norm(norm), self.linear(modules)

        def normed_linear(hidden, tokens, *tensors):
            return linear(normed(hidden, *tensors), tokens, *tensors)

        return normed_linear

    def norm_alone(self, name: str):
        """The norm of its input, in the compute dtype of what reads it."""
        normed, compute = self.norm(name), self.compute

        def norm_alone(hidden, tokens, *tensors):
            return normed(hidden, *tensors).astype(compute)

        return norm_alone

    def norm(self, name: str):
        """(hidden, *tensors) -> its norm."""
        weight, bias = self.position[f"{name}.weight"], self.position.get(f"{name}.bias", ABSENT)
        normed = self.numbers.kernels.normed

        def norm(hidden, *tensors):
            return normed(hidden, tensors[weight])

        def norm_biased(hidden, *tensors):
            return normed(hidden, tensors[weight], tensors[bias])

        return norm if bias == ABSENT else norm_biased

    def linear(self, modules):
        """W hidden + bias + scaling x B A dropout(hidden) of modules with one input, side by side."""
        compute, is_transposed = self.compute, self.block.is_transposed
        weights, biases, adapter = self._all(modules, "weight"), self._all(modules, "bias"), self._adapter(modules)
        biased = ABSENT not in biases and (self.numbers.adds_bias or slices.module_axis(modules[0]) == 0)
        if ABSENT in biases and any(place != ABSENT for place in biases):
            raise ValueError(f"{', '.join(modules)}: either all of them have a bias or none")

        def linear(hidden, tokens, *tensors):
            hidden = hidden.astype(compute)
            if is_transposed:
                result = ops.product(hidden, tensors[weights[0]].astype(compute))
            else:
                result = ops.linear(hidden, _joined(tensors, weights))
            if biased:
                result = result + _joined(tensors, biases).astype(compute)
            return adapter(result, hidden, tokens, tensors)

        return linear

    def _all(self, modules, leaf: str) -> tuple[int, ...]:
        """The places of a tensor of each module."""
        return tuple(self.position.get(f"{module}.{leaf}", ABSENT) for module in modules)

    def _adapter(self, modules):
        """(result, hidden, tokens, tensors) -> the result with what the adapters of modules side by side add."""
        leaves = ("weight", "lora_A.weight", "lora_B.weight", "features")
        weights, reducers, expanders, features = (self._all(modules, leaf) for leaf in leaves)
        numbers = self.numbers
        adapted = tuple(place for place in reducers if place != ABSENT)
        expanding = tuple(place for place in expanders if place != ABSENT)
        dropping = tuple(zip(reducers, features, strict=True)) if numbers.dropout else ()
        sides = tuple(zip(weights, expanders, strict=True))

        def reduce(hidden, tokens, tensors):
            if not dropping:
                return ops.linear(hidden, _joined(tensors, adapted))
            results = ()
            for lora_a, keys in dropping:
                if lora_a != ABSENT:
                    kept = ops.dropout(hidden, tokens, tensors[keys], numbers.dropout)
                    results = results + (ops.linear(kept, tensors[lora_a]),)
            return operators.concat(results, 1) if len(results) > 1 else results[0]

        def adapter(result, hidden, tokens, tensors):
            if not (numbers.adapter and adapted):
                return result
            reduced = reduce(hidden, tokens, tensors) * numbers.scaling
            if len(sides) == 1:
                return result + ops.linear(reduced, tensors[expanding[0]])
            return result + ops.linear(reduced, _side_by_side(tensors, sides, expanding))

        return adapter


def _joined(tensors, places):
    """Tensors below one another."""
    if len(places) == 1:
        return tensors[places[0]]
    found = ()
    for place in places:
        found = found + (tensors[place],)
    return operators.concat(found)


def _side_by_side(tensors, sides, expanding):
    """The B matrices of adapters [out, rank] as one [all outs, all ranks], each in rows and columns of its own.

    `sides` are the places of each module's weight and B (ABSENT: no adapter), `expanding` those of the B matrices.
    """
    rank, dtype = tensors[expanding[0]].shape[1], tensors[expanding[0]].dtype
    rows, before, behind = (), 0, len(expanding) * rank
    for weight, expander in sides:
        height = tensors[weight].shape[0]
        if expander == ABSENT:
            row = operators.zeros((height, len(expanding) * rank), dtype)
        else:
            row, behind = tensors[expander], behind - rank
            if before > 0:
                row = operators.concat((operators.zeros((height, before), dtype), row), 1)
            if behind > 0:
                row = operators.concat((row, operators.zeros((height, behind), dtype)), 1)
            before = before + rank
        rows = rows + (row,)
    return operators.concat(rows) if len(rows) > 1 else rows[0]
