"""A decoder's block for generation, written out: few rows, no gradients, keys and values in a cache."""

import torch
from torch.nn import functional

from msft.backend.torch import attention, block, experts, ops, replaced
from msft.models import rope
from msft.models.shapes import module_sizes
from msft.models.spec import ModelSpec


class Linear:
    """W hidden + bias + scaling x B A hidden of one module, on rows [n, in] in the compute dtype."""

    def __init__(self, module, compute: torch.dtype, is_transposed: bool):
        base = getattr(module, "base_layer", module)
        weight = base.weight.t().contiguous() if is_transposed else base.weight
        self.weight = weight.to(compute)
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
        self.spec, self.form, self.window = decoder.spec, decoder.spec.block, decoder.spec.windows[number]
        self.layer = decoder.network.get_submodule(self.spec.layer(number).removesuffix("."))
        self.compute, self.scores = ops.dtype(decoder.runtime.precision.compute), decoder.scores
        self.cache = cache
        self.linears = {
            name: Linear(self.layer.get_submodule(name), self.compute, self.form.is_transposed)
            for name in module_sizes(self.spec, self.spec.has_experts(number))
        }
        self.experts = self.spec.experts if self.spec.has_experts(number) else None
        self.activate = replaced.ACTIVATIONS[self.form.activation]

    def __call__(self, hidden: torch.Tensor, step: "Step") -> torch.Tensor:
        """Take hidden [rows x length, hidden] of the positions of a `Step`; return the same after the block."""
        form, normed = self.form, self._norm(self.form.attention_norm, hidden)
        mixed = self.linears[form.merge](self._attend(normed, step))
        middle = (normed * form.residual if form.residual else hidden) + self._norm(form.merged_norm, mixed)
        normed = self._norm(form.feed_norm, hidden if form.is_parallel else middle)
        if self.experts:
            return middle + self._routed(normed)
        kept = normed * form.residual if form.residual else middle
        return kept + self._norm(form.contracted_norm, self.linears[form.contract](self._widened(normed)))

    def _norm(self, name: str, hidden):
        """The norm of that name, in the compute dtype; hidden as it is where there is none."""
        return self.layer.get_submodule(name)(hidden).to(self.compute) if name else hidden

    def _widened(self, normed):
        parts = [self.linears[name](normed) for name in self.form.expand]
        if not self.form.is_gated:
            return self.activate(parts[0])
        gate, up = parts if len(parts) == 2 else parts[0].chunk(2, -1)
        return self.activate(gate).mul_(up)

    def _routed(self, normed):
        """What the experts give, the shared one too."""
        found = experts.routed(self.layer.mlp, self.experts, self._product, self._swiglu, normed)
        if self.experts.shared_width:
            share = torch.sigmoid(self.linears[self.experts.shared_gate](normed))
            wide = self._swiglu(*(self.linears[name](normed) for name in self.experts.shared_expand))
            found = found + share * self.linears[self.experts.shared_contract](wide)
        return found

    def _product(self, rows, weight):
        weight = weight.to(self.compute)
        return block.few_rows(rows, weight) if len(rows) <= block.VECTORS else functional.linear(rows, weight)

    def _swiglu(self, gate, up):
        return self.activate(gate).mul_(up)

    def _attend(self, normed, step: "Step"):
        query, key, value = (self._heads(rows, step) for rows in self._projected(normed))
        if self.form.head_norms:
            query, key = (
                self._norm(name, heads) for name, heads in zip(self.form.head_norms, (query, key), strict=True)
            )
        turned = step.rotate(torch.cat((query, key), 1)).to(self.compute)
        query, key = turned.split((query.shape[1], key.shape[1]), 1)
        keys, values = self.cache[:, :, :, : step.end]
        keys[:, :, step.slot :], values[:, :, step.slot :] = key, value
        mixed = step.attend(query, keys, values, self.scores._replace(window=self.window))
        return mixed.transpose(1, 2).reshape(len(normed), -1)

    def _projected(self, normed):
        """Queries, keys and values [rows x length, heads x head_dim]."""
        spec, parts = self.spec, [self.linears[name](normed) for name in self.form.project]
        if len(parts) == 3:
            return parts
        queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        if not self.form.is_grouped:
            return parts[0].split((queries, keys, keys), -1)
        grouped = parts[0].unflatten(-1, (spec.num_key_value_heads, -1, spec.head_dim))
        return grouped[:, :, :-2].flatten(1), grouped[:, :, -2].flatten(1), grouped[:, :, -1].flatten(1)

    def _heads(self, rows, step: "Step"):
        return rows.view(step.rows, -1, rows.shape[-1] // self.spec.head_dim, self.spec.head_dim).transpose(1, 2)


class Step:
    """What one call of every block shares: where its positions stand, their rotation, and what they see."""

    def __init__(
        self,
        spec: ModelSpec,
        slot: int,
        length: int,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        real: torch.Tensor | None,
        open_to: torch.Tensor | None = None,
    ):
        """cosine, sine [rows, length, head_dim]; `real` bool [rows, keys] is False on left padding, None without.

        All queries of a row see the real keys before slot `open_to` int64 [rows]; None = causal alone.
        """
        self.spec, self.slot, self.end = spec, slot, slot + length
        self.rows, self.device = len(cosine), cosine.device
        signs = torch.from_numpy(rope.signs(spec)).to(cosine)
        self.cosine, self.signed_sine = cosine.unsqueeze(1), sine.unsqueeze(1) * signs
        self.real, self.open_to, self._masks = real, open_to, {}

    def rotate(self, heads: torch.Tensor) -> torch.Tensor:
        """Turn queries or keys [rows, heads, length, head_dim] to their positions."""
        spec, turned = self.spec, self.spec.rotary_dim
        if not turned:
            return heads
        if spec.prefix:
            swapped = heads.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)
            return torch.addcmul(heads * self.cosine, swapped, self.signed_sine)
        if turned == spec.head_dim and not spec.neighbours:
            return torch.addcmul(heads * self.cosine, heads.roll(turned // 2, -1), self.signed_sine)
        first, rest = heads[..., :turned], heads[..., turned:]
        pairs = first.unflatten(-1, (-1, 2) if spec.neighbours else (2, -1))
        swapped = pairs.flip(-1 if spec.neighbours else -2).flatten(-2)
        return torch.addcmul(heads * self.cosine, torch.cat((swapped, rest), -1), self.signed_sine)

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: attention.Scores
    ) -> torch.Tensor:
        """Mix the values that each query [rows, heads, length, head_dim] sees."""
        masks = self._masks_of(scores.window if scores.window < self.end else 0)
        return attention.over_cache(query, keys, values, *masks, self.spec.attention_scale, scores)

    def _masks_of(self, window: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`allowed` and `bias` of `attention.over_cache`."""
        if self.real is None and self.open_to is None and not window:
            return None, None
        if window not in self._masks:
            slots = torch.arange(self.end, device=self.device)
            distance = slots[self.slot :, None] - slots
            allowed = ((distance >= 0) & (distance < (window or self.end)))[None, None]
            if self.open_to is not None:
                allowed = allowed | (slots < self.open_to[:, None])[:, None, None]
            if self.real is not None:
                allowed = allowed & self.real[:, None, None, : self.end]
            last = allowed[:, :, -1:]
            bias = torch.zeros(last.shape, device=self.device).masked_fill_(~last, float("-inf"))
            self._masks[window] = allowed, bias.expand(self.rows, -1, -1, -1)
        return self._masks[window]
