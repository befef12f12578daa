"""`attention` by Ascend's flash attention."""

from collections.abc import Callable

import numpy as np
from mindspore import Tensor
from mindspore import ops as operators

from msft.backend import line
from msft.backend.mindspore import distributed
from msft.backend.mindspore.attention import Scores
from msft.models.spec import ModelSpec


def fused_dense(scores_of: Scores) -> Callable:
    """Return `dense` by Ascend's flash attention."""

    def attention(query, key, value, allowed):
        return operators.flash_attention_score(
            query,
            key,
            value,
            query.shape[1],
            attn_mask=operators.logical_not(allowed).expand_dims(1),
            scalar_value=scores_of.scale,
            input_layout="BNSD",
        )

    return attention


class FusedAttention:
    """`TiledAttention` by Ascend's flash attention."""

    def __init__(self, spec: ModelSpec):
        self.heads, self.kv_heads, self.dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.scale = spec.attention_scale
        self.triangle = np.triu(np.ones((2048, 2048), dtype=np.uint8), 1)
        self.gradient = operators.GradOperation(get_all=True, sens_param=True)(self._mix)

    def plan(self, found: line.Line) -> tuple:
        """Return where the stretches of queries and of keys end, and the triangle that the kernel wants."""
        ends = _ends(found)
        return ends, ends, Tensor(self.triangle)

    def forward(self, heads: Tensor, plan: tuple) -> tuple[Tensor, list]:
        """See `TiledAttention`."""
        return self._mix(heads, *plan), []

    def backward(self, gradient: Tensor, heads: Tensor, mixed: Tensor, kept: list, plan: tuple) -> Tensor:
        """See `TiledAttention`."""
        return self.gradient(heads, *plan, gradient)[0]

    def _mix(self, heads, ends, key_ends, triangle):
        parts = heads.reshape(-1, self.heads + 2 * self.kv_heads, self.dim)
        parts = operators.split(parts, (self.heads, self.kv_heads, self.kv_heads), 1)
        return self._attend(*parts, ends, key_ends, triangle)

    def _attend(self, query, key, value, ends, key_ends, triangle):
        # Where keys are more than queries, the last query sees the last key.
        mixed = operators.flash_attention_score(
            query,
            key,
            value,
            self.heads,
            attn_mask=triangle,
            actual_seq_qlen=ends,
            actual_seq_kvlen=key_ends,
            scalar_value=self.scale,
            input_layout="TND",
            sparse_mode=3,
        )
        return mixed.reshape(-1, self.heads * self.dim)


class SharedFusedAttention(FusedAttention):
    """`SharedTiledAttention` by Ascend's flash attention, for which each stretch of queries has keys of its own."""

    def plan(self, found: line.Line) -> tuple:
        """Return the places of the keys among those of all ranks, and what `FusedAttention` needs."""
        ends, fill = _ends(found), np.zeros(len(found.input_ids) - len(found.places), int)
        seen = [np.arange(start, stop) for start, stop in found.pieces[:, 2:]]
        key_ends = np.cumsum([*map(len, seen), *(fill + 1)])
        keys = found.order[np.concatenate([*seen, fill])]
        return Tensor(keys.astype(np.int32)), ends, tuple(map(int, key_ends)), Tensor(self.triangle)

    def forward(self, heads: Tensor, plan: tuple) -> tuple[Tensor, list]:
        """See `TiledAttention`."""
        return self._mix(heads, self._gathered(heads), *plan), []

    def backward(self, gradient: Tensor, heads: Tensor, mixed: Tensor, kept: list, plan: tuple) -> Tensor:
        """See `TiledAttention`."""
        queries, whole = self.gradient(heads, self._gathered(heads), *plan, gradient)[:2]
        return operators.concat((queries[:, : self.heads * self.dim], distributed.sum_parts(whole)), 1)

    def _gathered(self, heads):
        return distributed.gather_parts(heads[:, self.heads * self.dim :])

    def _mix(self, heads, whole, keys, ends, key_ends, triangle):
        query = heads[:, : self.heads * self.dim].reshape(-1, self.heads, self.dim)
        pairs = operators.gather(whole, keys, 0).reshape(-1, 2 * self.kv_heads, self.dim)
        return self._attend(query, *operators.split(pairs, self.kv_heads, 1), ends, key_ends, triangle)


def _ends(found: line.Line) -> tuple[int, ...]:
    """Where each stretch of queries ends, those that fill the line up one by one."""
    return (*map(int, found.pieces[:, 1]), *range(len(found.places) + 1, len(found.input_ids) + 1))
