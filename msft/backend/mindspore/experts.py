"""Routed experts in place of a block's feed-forward, with their gradients: `Expand` and `Contract`, as `block.Step`s.

The router's shares come to the host, which groups the tokens by expert. Each expert's tokens are cut into pieces of few
sizes, so that few functions are compiled; what a piece is filled up with has no weight. No token is dropped. A piece's
function takes one expert's matrices out of those of all: nothing larger than one of them is copied.
"""

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import mindspore
import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import routing
from msft.backend.mindspore import ops
from msft.backend.mindspore.parts import Numbers

# Tokens of a piece: the largest that fit, and one of the smallest for the rest.
PIECES = (1024, 256, 64)
# For new tokens, of which there are few.
FEW = 8
# What `describe` says of them.
APPLIED = (
    f"an expert's tokens in pieces of {PIECES[0]}, {PIECES[1]} and {PIECES[2]}, none dropped; shares in float32, "
    "chosen by the host; plain products, since Ascend's grouped one could not be tried"
)


class Routing(NamedTuple):
    """What layers with experts take of a line: how many of its tokens are real, and what they are counted in."""

    tokens: int
    balance: routing.Balance | None


class Piece(NamedTuple):
    """Tokens of an `expert`: their `rows` in the line [n, 1], and where their weights are among all [n], both int32."""

    number: int
    expert: Tensor
    rows: Tensor
    places: Tensor


class Routed(NamedTuple):
    """What `Expand` gives: the norm, which experts tokens have [tokens, experts], `weigh`, each piece's gate and up."""

    normed: Tensor
    mask: Tensor
    weights: Tensor
    pieces: list[Piece]
    wide: list[Tensor]


class Back(NamedTuple):
    """What `Contract` gives on the way back: gradients of all that was `routed`.

    `pieces` are those of gate, up and weight; `total` [tokens, hidden and weights] those of the norm, all but the
    router's, and of the weights; `by_normed` is the whole one of the norm.
    """

    routed: Routed
    pieces: list[Tensor]
    total: Tensor
    by_normed: Tensor


class Expand:
    """From hidden states to `Routed`: the norm, the router, the experts' first matrices."""

    def __init__(self, numbers: Numbers, layout, norm):
        self.experts, self.norm = numbers.form.experts, norm
        self.functions = _functions(numbers)
        self.router, self.matrices = (_place(layout, name) for name in (self.experts.router, self.experts.expand))

    def forward(self, values: Tensor, line, tensors) -> Routed:
        """Return what is made of hidden states [length, hidden]."""
        normed, functions = self.norm.forward(values, line, tensors), self.functions
        router, matrices = tensors[self.router.place], tensors[self.matrices.place]
        mask = self._chosen(ops.to_numpy(functions.shares(normed, router)), line.routing)
        pieces, mask = _pieces(mask, len(mask) < PIECES[-1]), Tensor(mask.astype(np.float32))
        weights = functions.weigh(normed, router, mask)
        wide = [functions.expand(normed, piece.rows, matrices, piece.expert) for piece in pieces]
        return Routed(normed, mask, weights, pieces, wide)

    def backward(self, back: Back, values: Tensor, line, tensors, onto: Tensor | None = None) -> Tensor:
        """Return the gradient of the hidden states, added to `onto`."""
        return self.norm.backward(back.by_normed, values, line, tensors, onto)

    def tuned_gradients(self, back: Back, values: Tensor, line, tensors) -> tuple:
        """See `block.Step.tuned_gradients`."""
        routed, found = back.routed, []
        if self.router.is_tuned:
            slope = _slope(line.routing.balance, self.experts.count)
            router = tensors[self.router.place]
            flat = self.functions.by_router(routed.normed, router, routed.mask, back.total, slope)
            found.append(((self.router.place,), flat))
        if self.matrices.is_tuned:
            parts = [
                (piece.number, self.functions.by_expand(part, routed.normed, piece.rows))
                for piece, part in zip(routed.pieces, back.pieces, strict=True)
            ]
            found.append(((self.matrices.place,), _by_expert(parts, tensors[self.matrices.place].shape)))
        return _joined([self.norm.tuned_gradients(back.by_normed, values, line, tensors), *found])

    def _chosen(self, shares: np.ndarray, line: Routing) -> np.ndarray:
        """Which experts each token of the line has, none where it is filled up; bool [length, experts]."""
        real, mask = shares[: line.tokens], np.zeros(shares.shape, bool)
        mask[: line.tokens] = routing.chosen(real, self.experts.chosen)
        if line.balance is not None:
            line.balance.add(mask.sum(0), real.astype(np.float64).sum(0), line.tokens)
        return mask


class Contract:
    """From `Routed` to the experts' output: their last matrices, and the expert that all tokens share."""

    def __init__(self, numbers: Numbers, layout, shared):
        self.experts, self.shared = numbers.form.experts, shared
        self.functions = _functions(numbers)
        names = self.experts.router, self.experts.expand, self.experts.contract
        self.router, self.first, self.matrices = (_place(layout, name) for name in names)

    def forward(self, routed: Routed, line, tensors, onto: Tensor) -> Tensor:
        """Return what the experts give [length, hidden], added to `onto`."""
        total = operators.zeros(onto.shape, mindspore.float32)
        for piece, wide in zip(routed.pieces, routed.wide, strict=True):
            where = piece.rows, piece.places, routed.weights
            total = self.functions.contract(total, wide, *where, tensors[self.matrices.place], piece.expert)
        found = self.functions.finish(onto, total)
        return self.shared.forward(routed.normed, line, tensors, found) if self.shared else found

    def backward(self, gradient: Tensor, routed: Routed, line, tensors) -> Back:
        """Return the gradients of all that was routed."""
        functions, experts = self.functions, self.experts
        last, first = tensors[self.matrices.place], tensors[self.first.place]
        total = operators.zeros((len(routed.normed), routed.normed.shape[1] + _columns(experts)), mindspore.float32)
        pieces = []
        for piece, wide in zip(routed.pieces, routed.wide, strict=True):
            back = functions.back(gradient, wide, piece.rows, piece.places, routed.weights, last, piece.expert)
            total = functions.back_onto(total, back, piece.rows, piece.places, first, piece.expert)
            pieces.append(back)
        slope = _slope(line.routing.balance, experts.count)
        by_normed = functions.by_normed(routed.normed, tensors[self.router.place], routed.mask, total, slope)
        if self.shared:
            by_normed = self.shared.backward(gradient, routed.normed, line, tensors, by_normed)
        return Back(routed, pieces, total, by_normed)

    def tuned_gradients(self, gradient: Tensor, routed: Routed, line, tensors) -> tuple:
        """See `block.Step.tuned_gradients`."""
        found = [self.shared.tuned_gradients(gradient, routed.normed, line, tensors)] if self.shared else []
        if self.matrices.is_tuned:
            parts = [
                (piece.number, self.functions.by_contract(gradient, wide, piece.rows, piece.places, routed.weights))
                for piece, wide in zip(routed.pieces, routed.wide, strict=True)
            ]
            found.append(((self.matrices.place,), _by_expert(parts, tensors[self.matrices.place].shape)))
        return _joined(found)


class _Place(NamedTuple):
    """Where a tensor is among those of a layout."""

    place: int
    is_tuned: bool


def _place(layout, name: str) -> _Place:
    return next(_Place(place, is_tuned) for place, (known, is_tuned) in enumerate(layout) if known == name)


def _columns(experts) -> int:
    """Columns of `weigh`: each expert's weight, a zero, each expert's share."""
    return 2 * experts.count + 1


def _slope(balance: routing.Balance | None, count: int) -> Tensor:
    """The gradient of the balance loss for each token's shares."""
    return Tensor(np.zeros(count, np.float32) if balance is None else balance.slope)


def _pieces(mask: np.ndarray, is_few: bool) -> list[Piece]:
    """The tokens of each expert in pieces."""
    width, found = 2 * mask.shape[1] + 1, []
    for number in np.flatnonzero(mask.any(0)):
        rows = np.flatnonzero(mask[:, number]).astype(np.int32)
        expert = Tensor(np.int32(number))
        while len(rows):
            size = FEW if is_few else next((size for size in PIECES if size <= len(rows)), PIECES[-1])
            own, rows = rows[:size], rows[size:]
            fill = size - len(own)
            places = np.concatenate((own * width + number, np.full(fill, mask.shape[1]))).astype(np.int32)
            own = np.concatenate((own, np.full(fill, own[0], np.int32)))
            found.append(Piece(int(number), expert, Tensor(own[:, None]), Tensor(places)))
    return found


def _by_expert(parts: list[tuple[int, Tensor]], shape: tuple[int, ...]) -> Tensor:
    """Gradients of matrices by expert as a flat tensor of all experts': the sum of its pieces', or zeros."""
    found: dict[int, Tensor] = {}
    for number, part in parts:
        found[number] = found[number] + part if number in found else part
    nothing = operators.zeros(shape[1:], mindspore.float32) if len(found) < shape[0] else None
    return operators.concat([found.get(number, nothing).reshape(-1) for number in range(shape[0])])


def _joined(found: list[tuple]) -> tuple:
    """Several (places, flat tensor) as one; those without a tensor are ()."""
    found = [part for part in found if part]
    if not found:
        return ()
    places = tuple(place for part in found for place in part[0])
    return places, found[0][1] if len(found) == 1 else operators.concat([part[1] for part in found])


@cache
def _functions(numbers: Numbers) -> SimpleNamespace:
    """The compiled functions of all layers with experts."""
    made = {**_of_router(numbers), **_of_pieces(numbers)}
    return SimpleNamespace(**{name: mindspore.jit(function) for name, function in made.items()})


def _of_router(numbers: Numbers) -> dict:
    experts, compute = numbers.form.experts, ops.dtype(numbers.compute)
    count, is_normed = experts.count, experts.is_normed

    def shares(normed, router):
        return operators.softmax(ops.linear(normed, router).astype(mindspore.float32), -1)

    def weigh(normed, router, mask):
        """The weights of chosen experts, a column of zeros, all shares: float32 [tokens, 2 x experts + 1]."""
        found = shares(normed, router)
        weights = found * mask
        if is_normed:
            total = weights.sum(-1, keepdims=True)
            weights = weights / (total + (total == 0).astype(mindspore.float32))
        return operators.concat((weights, operators.zeros_like(found[:, :1]), found), 1)

    gradient_of = ops.gradient(weigh)

    def by_columns(normed, total, mask, slope):
        """The gradient of what `weigh` gives; the slope is that of the shares of real tokens."""
        real = (mask.sum(-1, keepdims=True) > 0).astype(mindspore.float32)
        return operators.concat((total[:, normed.shape[1] : normed.shape[1] + count + 1], real * slope), 1)

    def by_normed(normed, router, mask, total, slope):
        by_router = gradient_of(normed, router, mask, by_columns(normed, total, mask, slope))[0]
        return (total[:, : normed.shape[1]] + by_router.astype(mindspore.float32)).astype(compute)

    def by_router(normed, router, mask, total, slope):
        return gradient_of(normed, router, mask, by_columns(normed, total, mask, slope))[1].reshape(-1)

    return {"shares": shares, "weigh": weigh, "by_normed": by_normed, "by_router": by_router}


def _of_pieces(numbers: Numbers) -> dict:
    experts, compute, gated_of = numbers.form.experts, ops.dtype(numbers.compute), numbers.kernels.gated
    add, columns, width = operators.ScatterNdAdd(), _columns(experts), experts.width

    def gated(wide):
        gate, up = operators.split(wide, width, 1)
        return gated_of(gate, up)

    gradient_of = ops.gradient(gated)

    def own(values, rows):
        return operators.gather(values, rows.reshape(-1), 0)

    def scales(weights, places):
        return operators.gather(weights.reshape(-1), places, 0).astype(compute).expand_dims(-1)

    def expand(normed, rows, matrices, expert):
        return ops.linear(own(normed, rows), operators.gather(matrices, expert, 0))

    def contract(total, wide, rows, places, weights, matrices, expert):
        found = ops.linear(gated(wide), operators.gather(matrices, expert, 0)) * scales(weights, places)
        return add(total, rows, found.astype(mindspore.float32))

    def finish(onto, total):
        return onto + total.astype(compute).astype(onto.dtype)

    def back(gradient, wide, rows, places, weights, matrices, expert):
        matrix = operators.gather(matrices, expert, 0).astype(compute)
        through = ops.product(own(gradient, rows).astype(compute), matrix)
        by_weight = (through * gated(wide)).astype(mindspore.float32).sum(-1, keepdims=True)
        by_wide = gradient_of(wide, through * scales(weights, places))[0]
        return operators.concat((by_wide.astype(mindspore.float32), by_weight), 1)

    def back_onto(total, back, rows, places, matrices, expert):
        matrix = operators.gather(matrices, expert, 0).astype(compute)
        by_rows = ops.product(back[:, :-1].astype(compute), matrix).astype(mindspore.float32)
        column = operators.arange(columns).astype(mindspore.int32) == (places % columns).expand_dims(-1)
        by_weights = back[:, -1:] * column.astype(mindspore.float32)
        return add(total, rows, operators.concat((by_rows, by_weights), 1))

    def by_expand(back, normed, rows):
        return ops.product_a(back[:, :-1].astype(compute), own(normed, rows)).astype(mindspore.float32)

    def by_contract(gradient, wide, rows, places, weights):
        scaled = own(gradient, rows).astype(compute) * scales(weights, places)
        return ops.product_a(scaled, gated(wide)).astype(mindspore.float32)

    return {
        "expand": expand,
        "contract": contract,
        "finish": finish,
        "back": back,
        "back_onto": back_onto,
        "by_expand": by_expand,
        "by_contract": by_contract,
    }
