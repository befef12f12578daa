"""A decoder's block as pure functions of tensors: RMSNorm, rotary embedding, attention, SwiGLU, LoRA."""

from msft.backend.mindspore import ops

ABSENT = -1


def whole(decoder, layout, dropout: float, adapter: bool):
    """Write one block as a function of (hidden, cosine, sine, allowed, tokens, *tensors in the layout's order)."""
    parts = Parts(decoder, layout, dropout, adapter)
    project, merge, feed_forward, attention = parts.project(), parts.merge(), parts.feed_forward(), parts.attention

    def block(hidden, cosine, sine, allowed, tokens, *tensors):
        query, key, value = project(hidden, cosine, sine, tokens, tensors)
        hidden = hidden + merge(attention(query, key, value, allowed), tokens, tensors)
        return hidden + feed_forward(hidden, tokens, tensors)

    return block


class Parts:
    """Writes the parts of a block for one layout; what they close over are numbers known when they are compiled."""

    def __init__(self, decoder, layout, dropout: float, adapter: bool):
        self.decoder = decoder
        self.spec = decoder.spec
        self.dropout = dropout
        self.adapter = adapter
        self.position = {name: position for position, (name, _) in enumerate(layout)}
        self.compute = ops.dtype(decoder.runtime.precision.compute)
        self.attention = decoder.kernels.attention

    def linear(self, module: str):
        """(hidden, tokens, tensors) -> W hidden + bias + scaling x B A dropout(hidden), in the compute dtype."""
        weight, bias, lora_a, lora_b, features = (
            self.position.get(f"{module}.{leaf}", ABSENT)
            for leaf in ("weight", "bias", "lora_A.weight", "lora_B.weight", "features")
        )
        adapted = self.adapter and lora_a != ABSENT
        compute, scaling, dropout = self.compute, self.decoder.scaling, self.dropout

        def linear(hidden, tokens, tensors):
            hidden = hidden.astype(compute)
            result = ops.linear(hidden, tensors[weight])
            if bias != ABSENT:
                result = result + tensors[bias].astype(compute)
            if adapted:
                kept = hidden
                if dropout > 0:
                    kept = ops.dropout(hidden, tokens, tensors[features], dropout)
                result = result + ops.linear(ops.linear(kept, tensors[lora_a]), tensors[lora_b]) * scaling
            return result

        return linear

    def norm(self, name: str):
        """(hidden, tensors) -> RMSNorm of hidden."""
        weight, eps, rms_norm = self.position[f"{name}.weight"], self.spec.rms_norm_eps, self.decoder.kernels.rms_norm

        def norm(hidden, tensors):
            return rms_norm(hidden, tensors[weight], eps)

        return norm

    def project(self):
        """(hidden, cosine, sine, tokens, tensors) -> rotated queries and keys, values [rows, heads, length, dim]."""
        norm, rotary, dim = self.norm("input_layernorm"), self.decoder.kernels.rotary, self.spec.head_dim
        query_of, key_of, value_of = (self.linear(f"self_attn.{name}_proj") for name in "qkv")

        def split(hidden):
            rows, length, features = hidden.shape
            return hidden.reshape(rows, length, features // dim, dim).transpose(0, 2, 1, 3)

        def project(hidden, cosine, sine, tokens, tensors):
            normed = norm(hidden, tensors)
            query = rotary(split(query_of(normed, tokens, tensors)), cosine, sine)
            key = rotary(split(key_of(normed, tokens, tensors)), cosine, sine)
            return query, key, split(value_of(normed, tokens, tensors))

        return project

    def merge(self):
        """(mixed [rows, heads, length, dim], tokens, tensors) -> attention's output projection."""
        output_of = self.linear("self_attn.o_proj")

        def merge(mixed, tokens, tensors):
            rows, heads, length, dim = mixed.shape
            return output_of(mixed.transpose(0, 2, 1, 3).reshape(rows, length, heads * dim), tokens, tensors)

        return merge

    def feed_forward(self):
        """(hidden, tokens, tensors) -> the SwiGLU feed-forward of the normed hidden states."""
        norm, swiglu = self.norm("post_attention_layernorm"), self.decoder.kernels.swiglu
        gate_of, up_of, down_of = (self.linear(f"mlp.{name}_proj") for name in ("gate", "up", "down"))

        def feed_forward(hidden, tokens, tensors):
            normed = norm(hidden, tensors)
            mixed = swiglu(gate_of(normed, tokens, tensors), up_of(normed, tokens, tensors))
            return down_of(mixed, tokens, tensors)

        return feed_forward
