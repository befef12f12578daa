"""A decoder's block for generation, written out: few rows, no gradients, keys and values in a cache."""

import torch
from torch.nn import functional

from msft.backend.torch import attention, block, ops

NORMS = ("input_layernorm", "post_attention_layernorm")


class Linear:
    """W hidden + bias + scaling x B A hidden of one module, on rows [n, in] in the compute dtype."""

    def __init__(self, module, compute: torch.dtype):
        base = getattr(module, "base_layer", module)
        self.weight = base.weight.to(compute)
        self.bias = None if base.bias is None else base.bias.to(compute)
        self.adapter = None
        if base is not module:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            self.adapter = a.to(compute).t(), b.to(compute).t(), module.scaling["default"]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        result = block.few_rows(rows, self.weight, self.bias)
        if self.adapter:
            a, b, scaling = self.adapter
            result = torch.addmm(result, rows @ a, b, alpha=scaling)
        return result


class CachedBlock:
    """The block of one layer; `cache` [2, rows, kv_heads, capacity, head_dim] holds its keys and values."""

    def __init__(self, decoder, number: int, cache: torch.Tensor):
        layer, self.spec = decoder.network.model.layers[number], decoder.spec
        self.compute = ops.dtype(decoder.runtime.precision.compute)
        mixer, feed_forward = layer.self_attn, layer.mlp
        self.cache = cache
        self.norms = [getattr(layer, name).weight for name in NORMS]
        self.query, self.key, self.value, self.output, self.gate, self.up, self.down = (
            Linear(module, self.compute)
            for module in (
                *(mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj),
                *(feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj),
            )
        )

    def __call__(self, hidden: torch.Tensor, step: "Step") -> torch.Tensor:
        """Take hidden [rows x length, hidden] of the positions of a `Step`; return the same after the block."""
        normed = self._norm(hidden, 0)
        hidden = hidden + self.output(self._attend(normed, step))
        normed = self._norm(hidden, 1)
        return hidden + self.down(functional.silu(self.gate(normed)).mul_(self.up(normed)))

    def _norm(self, hidden, which: int):
        return block.rms_norm(hidden, self.norms[which], self.spec.norm_eps).to(self.compute)

    def _attend(self, normed, step: "Step"):
        query, key, value = (self._heads(linear(normed), step) for linear in (self.query, self.key, self.value))
        turned = step.rotate(torch.cat((query, key), 1)).to(self.compute)
        query, key = turned.split((query.shape[1], key.shape[1]), 1)
        keys, values = self.cache[:, :, :, : step.end]
        keys[:, :, step.slot :], values[:, :, step.slot :] = key, value
        return step.attend(query, keys, values).transpose(1, 2).reshape(len(normed), -1)

    def _heads(self, rows, step: "Step"):
        return rows.view(step.rows, -1, rows.shape[-1] // self.spec.head_dim, self.spec.head_dim).transpose(1, 2)


class Step:
    """What one call of every block shares: where its positions stand, their rotation, and what they see."""

    def __init__(self, slot: int, length: int, cosine: torch.Tensor, sine: torch.Tensor, real: torch.Tensor | None):
        """cosine, sine [rows, length, head_dim]; `real` bool [rows, keys] is False on left padding, None without."""
        self.slot, self.end = slot, slot + length
        self.rows, self.scale = len(cosine), cosine.shape[-1] ** -0.5
        self.half = cosine.shape[-1] // 2
        left, right = sine.unsqueeze(1).chunk(2, -1)
        self.cosine, self.signed_sine = cosine.unsqueeze(1), torch.cat((-left, right), -1)
        self.allowed = self.bias = None
        if real is not None:
            seen = real[:, None, None, : self.end]
            earlier = torch.ones(length, self.end, dtype=torch.bool, device=real.device).tril(slot)
            self.allowed = earlier & seen
            self.bias = torch.zeros(seen.shape, device=real.device).masked_fill_(~seen, float("-inf"))

    def rotate(self, heads: torch.Tensor) -> torch.Tensor:
        """Turn queries or keys [rows, heads, length, head_dim] to their positions."""
        return torch.addcmul(heads * self.cosine, heads.roll(self.half, -1), self.signed_sine)

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Mix the values that each query [rows, heads, length, head_dim] sees."""
        return attention.over_cache(query, keys, values, self.allowed, self.bias, self.scale)
