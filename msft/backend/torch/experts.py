"""Routed experts: tokens in the order of their experts, each expert's products with its own ones; none is dropped.

It takes the place of transformers' own: their loop over experts makes a gradient of all matrices for each expert, and
takes twice the time where these are tuned; their `grouped_mm` is as fast and as exact on CPU, but takes the dtype of
its products from autocast. Products are torch's own rather than `block.product`'s: an expert has another number of
tokens in each batch, and oneDNN makes and keeps something for each number (half as much time again, 280 MB).
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from msft.backend.routing import Balance
from msft.backend.torch import block, ops
from msft.models.experts import Experts
from msft.models.spec import ModelSpec

# What `describe` says of them.
APPLIED = "each one's products with its own tokens, none dropped; shares in float32"


def place(network: nn.Module, spec: ModelSpec, parts: block.Parts, compute: torch.dtype) -> None:
    """Put this module's `forward` into a network's layers with experts."""
    for mlp in _mlps(network, spec):
        mlp.balance = None
        mlp.forward = functools.partial(_forward, mlp, spec.experts, parts, compute)


def count(network: nn.Module, spec: ModelSpec, balance: Balance | None) -> None:
    """Let layers with experts count for a balance loss and add its slope on their way back, or not (None)."""
    for mlp in _mlps(network, spec):
        mlp.balance = balance


def _mlps(network: nn.Module, spec: ModelSpec) -> list[nn.Module]:
    layers = [] if spec.experts is None else spec.experts.layers
    return [network.get_submodule(f"{spec.layer(number)}mlp") for number in layers]


def _forward(mlp: nn.Module, experts: Experts, parts: block.Parts, compute: torch.dtype, hidden: torch.Tensor):
    def product(rows, weight):
        return functional.linear(rows.to(compute), weight.to(compute))

    rows = hidden.flatten(0, -2)
    mixed = routed(mlp, experts, product, parts.swiglu, rows)
    if experts.shared_width:
        share = torch.sigmoid(mlp.shared_expert_gate(rows))
        mixed = mixed + share * mlp.shared_expert(rows)
    return mixed.view_as(hidden)


def routed(mlp: nn.Module, experts: Experts, product: Callable, swiglu: Callable, rows: torch.Tensor) -> torch.Tensor:
    """Return what the chosen experts give, summed in the dtype of products, for rows [n, hidden].

    `product` is rows x weight transposed in the compute dtype.
    """
    shares = torch.softmax(product(rows, mlp.gate.weight).float(), -1)
    # Stable, so that of equal shares the first expert's counts as larger, as on the other engine.
    order = shares.detach().sort(dim=-1, descending=True, stable=True).indices[:, : experts.chosen]
    if mlp.balance is not None:
        shares = _Balanced.apply(shares, order, mlp.balance)
    weights = shares.gather(1, order)
    if experts.is_normed:
        weights = weights / weights.sum(-1, keepdim=True)
    by_expert = order.flatten().argsort(stable=True)
    tokens = by_expert // experts.chosen
    counts = order.flatten().bincount(minlength=experts.count).tolist()
    results = []
    # One operator for all matrices: a gradient for each would be as large as all of them.
    stacked = zip(mlp.experts.gate_up_proj.unbind(), mlp.experts.down_proj.unbind(), strict=True)
    for own, (expand, contract) in zip(rows.index_select(0, tokens).split(counts), stacked, strict=True):
        if len(own):
            results.append(product(swiglu(*product(own, expand).chunk(2, -1)), contract))
    found = torch.cat(results) * weights.flatten().index_select(0, by_expert).to(results[0].dtype).unsqueeze(1)
    return found.new_zeros(len(rows), found.shape[1]).index_add(0, tokens, found)


class _Balanced(torch.autograd.Function):
    """Shares as they are, counted; on the way back, when all layers have been counted, the loss's slope is added."""

    @staticmethod
    def forward(ctx, shares, order, balance):
        choices = order.flatten().bincount(minlength=shares.shape[1])
        balance.add(ops.to_numpy(choices), ops.to_numpy(shares.sum(0)), len(shares))
        ctx.balance = balance
        return shares.view_as(shares)

    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.from_numpy(ctx.balance.slope).to(gradient), None, None
