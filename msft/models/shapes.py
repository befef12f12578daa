"""A decoder's tensors and linear modules, by its description."""

from msft.models import encoder_shapes
from msft.models.spec import ModelSpec


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the model, in the order of their use, with its shape; a tied head has none of its own."""
    if spec.encoder:
        return encoder_shapes.tensor_shapes(spec)
    outside, hidden = spec.outside, spec.hidden_size
    shapes = {spec.embedding: (spec.vocab_size, hidden)}
    if outside.positions:
        shapes[f"{outside.positions}.weight"] = (spec.max_position_embeddings + outside.first_position, hidden)
    if outside.embedding_norm:
        shapes |= _norm(outside.embedding_norm, spec)
    for number in range(spec.num_hidden_layers):
        layer = _layer(spec, spec.has_experts(number))
        shapes |= {spec.layer(number) + name: shape for name, shape in layer.items()}
    shapes |= _norm(outside.norm, spec)
    if not spec.tie_word_embeddings:
        shapes[spec.head] = (spec.vocab_size, hidden)
    return shapes


def linear_modules(spec: ModelSpec) -> list[str]:
    """Return the paths of all linear modules that LoRA can tune, such as 'model.layers.0.self_attn.q_proj'."""
    if spec.encoder:
        return encoder_shapes.linear_modules(spec)
    return [
        spec.layer(number) + name
        for number in range(spec.num_hidden_layers)
        for name in module_sizes(spec, spec.has_experts(number))
        if name not in spec.block.unadapted
    ]


def module_sizes(spec: ModelSpec, has_experts: bool = False) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of the linear modules of a layer, which may have experts, by their names within it."""
    block, hidden, wide = spec.block, spec.hidden_size, spec.intermediate_size
    if spec.state_space:
        return spec.state_space.module_sizes(hidden)
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    heads = (queries, keys, keys) if len(block.project) == 3 else (queries + 2 * keys,)
    gates = (wide,) * len(block.expand) if len(block.expand) == 2 or not block.is_gated else (2 * wide,)
    attention = {
        **{name: (size, hidden) for name, size in zip(block.project, heads, strict=True)},
        block.merge: (hidden, queries),
    }
    if has_experts:
        return attention | spec.experts.module_sizes(hidden)
    return attention | {
        **{name: (size, hidden) for name, size in zip(block.expand, gates, strict=True)},
        block.contract: (hidden, wide),
    }


def _layer(spec: ModelSpec, has_experts: bool) -> dict[str, tuple[int, ...]]:
    block, shapes = spec.block, {}
    for name, (outputs, inputs) in module_sizes(spec, has_experts).items():
        shapes[f"{name}.weight"] = (inputs, outputs) if block.is_transposed else (outputs, inputs)
        if name in block.biased:
            shapes[f"{name}.bias"] = (outputs,)
    if has_experts:
        shapes |= spec.experts.shapes(spec.hidden_size)
    shapes |= {f"{name}.weight": (spec.head_dim,) for name in block.head_norms}
    shapes |= spec.state_space.shapes() if spec.state_space else {}
    for name in block.norms:
        shapes |= _norm(name, spec)
    return shapes


def _norm(name: str, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    leaves = ("weight", "bias") if spec.norm == "layer" else ("weight",)
    return {f"{name}.{leaf}": (spec.hidden_size,) for leaf in leaves}
