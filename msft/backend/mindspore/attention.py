"""Attention of queries with the keys that a mask names: by plain operators, or Ascend's flash attention."""

from collections.abc import Callable

import mindspore
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend.contract import Precision

MASKED = -1e30


def dense(precision: Precision) -> Callable:
    """Return attention by plain operators; see `ops.Kernels.attention`."""
    kind = getattr(mindspore, precision.softmax)

    def attention(query, key, value, allowed):
        rows, heads, length, dim = query.shape
        groups, keys = key.shape[1], key.shape[2]
        # Grouped heads share one product: the queries of a group stand below one another.
        query = query.reshape(rows, groups, heads // groups * length, dim)
        scores = operators.BatchMatMul(transpose_b=True)(query, key).astype(kind) * (dim**-0.5)
        scores = scores.reshape(rows, groups, heads // groups, length, keys)
        bias = operators.where(allowed, Tensor(0.0, kind), Tensor(MASKED, kind))
        scores = scores + bias.expand_dims(1).expand_dims(1)
        weights = operators.softmax(scores, -1).astype(value.dtype)
        mixed = operators.BatchMatMul()(weights.reshape(rows, groups, heads // groups * length, keys), value)
        return mixed.reshape(rows, heads, length, dim)

    return attention


def fused(query, key, value, allowed):
    """Attention by Ascend's flash attention; see `ops.Kernels.attention`."""
    return operators.flash_attention_score(
        query,
        key,
        value,
        query.shape[1],
        attn_mask=operators.logical_not(allowed).expand_dims(1),
        scalar_value=query.shape[-1] ** -0.5,
        input_layout="BNSD",
    )
