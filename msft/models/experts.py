"""Routed experts in place of a decoder's feed-forward: how many, which layers have them, and their tensors' names."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Experts:
    """What the layers with experts are made of; names are those of transformers' v5 classes, within the layer.

    A token is computed by the `chosen` experts out of `count` to which the router's softmax gives most, each times its
    share, which `is_normed` makes add up to 1. An expert is a gated feed-forward of `width` features. All experts of a
    layer stand in two tensors: `expand` [count, 2 x width, hidden], gates above what they let through, and `contract`
    [count, hidden, width]. With a `shared_width` all tokens also get a feed-forward of that width, times the sigmoid of
    what `shared_gate` gives. `layers` are the numbers of the layers with experts; the others have a plain feed-forward.
    """

    count: int
    chosen: int
    width: int
    layers: tuple[int, ...]
    is_normed: bool = True
    shared_width: int = 0
    router: str = "mlp.gate.weight"
    expand: str = "mlp.experts.gate_up_proj"
    contract: str = "mlp.experts.down_proj"
    shared_expand: tuple[str, ...] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    shared_contract: str = "mlp.shared_expert.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors of no linear module: adapters cannot stand beside them."""
        return self.router, self.expand, self.contract

    @property
    def modules(self) -> tuple[str, ...]:
        """The linear modules, all of the shared expert, in the order of their use."""
        return (*self.shared_expand, self.shared_contract, self.shared_gate) if self.shared_width else ()

    def shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `tensors`."""
        shapes = (self.count, hidden), (self.count, 2 * self.width, hidden), (self.count, hidden, self.width)
        return dict(zip(self.tensors, shapes, strict=True))

    def module_sizes(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Return outputs and inputs of `modules`."""
        wide = self.shared_width
        sizes = (wide, hidden), (wide, hidden), (hidden, wide), (1, hidden)
        return dict(zip(self.modules, sizes, strict=True)) if self.modules else {}


def sparse_layers(layers: int, step: int, dense: list[int]) -> tuple[int, ...]:
    """Return which of so many layers have experts: each `step`-th, without those that are named as `dense`."""
    return tuple(number for number in range(layers) if number not in dense and (number + 1) % step == 0)


def row_count(shape: tuple[int, ...]) -> int:
    """Return the rows of a tensor: of all axes but the last as one, or a vector's numbers."""
    return prod(shape[:-1]) if len(shape) > 1 else prod(shape)


def split_rows(name: str, shape: tuple[int, ...], experts: Experts, names: tuple[str, str, str]):
    """Yield what files call the parts of a stacked tensor, and these parts' first and last rows.

    `names` are those of an expert's gate, of what it lets through and of its last matrix, within the layer; '{}' in
    them stands for its number. Where there is none, the parts of all experts have one name.
    """
    is_wide = name.endswith(experts.expand)
    layer = name.removesuffix(experts.expand if is_wide else experts.contract)
    parts = names[:2] if is_wide else names[2:]
    size = shape[1] // len(parts)
    for number in range(shape[0]):
        for place, part in enumerate(parts):
            start = (number * len(parts) + place) * size
            yield layer + part.format(number), start, start + size
