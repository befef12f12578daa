"""An encoder-decoder's tensors and linear modules, by its description: the encoder's first, then the decoder's."""

from msft.models.spec import Block, ModelSpec


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return what `shapes.tensor_shapes` does, of a model whose norms have no bias."""
    encoder, hidden = spec.encoder, spec.hidden_size
    shapes = {spec.embedding: (spec.vocab_size, hidden)}
    for number in range(encoder.num_hidden_layers):
        shapes |= _layer(encoder.layer(number), encoder.block, number, spec)
    shapes[f"{encoder.norm}.weight"] = (hidden,)
    for number in range(spec.num_hidden_layers):
        shapes |= _layer(spec.layer(number), spec.block, number, spec)
        shapes |= {f"{spec.layer(number)}{name}.weight": shape for name, shape in cross_sizes(spec).items()}
        shapes[f"{spec.layer(number)}{encoder.cross.norm}.weight"] = (hidden,)
    shapes[f"{spec.outside.norm}.weight"] = (hidden,)
    if not spec.tie_word_embeddings:
        shapes[spec.head] = (spec.vocab_size, hidden)
    return shapes


def linear_modules(spec: ModelSpec) -> list[str]:
    """Return what `shapes.linear_modules` does."""
    encoder, block = spec.encoder, spec.block
    reading = (*block.project, block.merge, *encoder.cross.modules, *block.expand, block.contract)
    found = [
        encoder.layer(number) + name for number in range(encoder.num_hidden_layers) for name in encoder.block.modules
    ]
    return found + [spec.layer(number) + name for number in range(spec.num_hidden_layers) for name in reading]


def cross_sizes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of the modules with which a decoder's layer reads the encoder."""
    heads, hidden, cross = spec.num_attention_heads * spec.head_dim, spec.hidden_size, spec.encoder.cross
    return {**dict.fromkeys((cross.query, *cross.states), (heads, hidden)), cross.merge: (hidden, heads)}


def deviations(spec: ModelSpec) -> dict[str, float]:
    """Return what T5's fresh matrices in layers deviate by, `initializer_range` being a factor on it.

    That is by 1 / the root of what is summed, so that scores need no scale; embedding and head deviate by the factor.
    """
    found, factor = {}, spec.initializer_range
    queries = (spec.block.project[0], spec.encoder.cross.query)
    for name, shape in tensor_shapes(spec).items():
        if len(shape) == 2 and name not in (spec.embedding, spec.head):
            summed = shape[1] * (spec.head_dim if name.removesuffix(".weight").endswith(queries) else 1)
            summed = spec.hidden_size if name.endswith(f"{spec.encoder.positions.module}.weight") else summed
            found[name] = factor * summed**-0.5
    return found


def _layer(prefix: str, block: Block, number: int, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The tensors of attention and feed-forward of a layer."""
    hidden, heads, wide = spec.hidden_size, spec.num_attention_heads * spec.head_dim, spec.intermediate_size
    sizes = {
        **dict.fromkeys(block.project, (heads, hidden)),
        block.merge: (hidden, heads),
        **dict.fromkeys(block.expand, (wide, hidden)),
        block.contract: (hidden, wide),
        **dict.fromkeys(block.norms, (hidden,)),
    }
    if number == 0:
        sizes[spec.encoder.positions.module] = (spec.encoder.positions.buckets, spec.num_attention_heads)
    return {f"{prefix}{name}.weight": shape for name, shape in sizes.items()}
