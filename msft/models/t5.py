"""T5, its release 1.1 and Flan-T5 (arXiv 1910.10683, 2210.11416): encoder-decoders with relative positions.

The first release has a feed-forward with relu and a head that is the embedding, before which hidden states are scaled;
1.1 and Flan-T5 have a gate with gelu_new and a head of their own. transformers 5 says the latter of files that it has
written by `scale_decoder_outputs`.
"""

from msft.errors import InputError
from msft.models.ckpt_layout import split_layout
from msft.models.encoder import Cross, Encoder, RelativePositions
from msft.models.family import CkptTensor, Family, FileNames, MindFormersNames
from msft.models.hf_config import MAX_LAYERS, HfConfig
from msft.models.spec import Block, ModelSpec, Outside

KEYS = {
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_decoder_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "d_kv",
    "norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "n_positions",
    "activation": "feed_forward_proj",
    "initializer_range": "initializer_factor",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
# What transformers takes for a key that is absent; the sizes are T5 small's.
DEFAULTS = {
    "vocab_size": 32128,
    "hidden_size": 512,
    "head_dim": 64,
    "intermediate_size": 2048,
    "num_layers": 6,
    "num_attention_heads": 8,
    "buckets": 32,
    "max_distance": 128,
    "norm_eps": 1e-6,
    "initializer_range": 1.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu_tanh"}
ATTENTION = tuple(f"layer.0.SelfAttention.{leaf}" for leaf in "qkvo")
CROSS = tuple(f"layer.1.EncDecAttention.{leaf}" for leaf in "qkvo")
POSITIONS = "layer.0.SelfAttention.relative_attention_bias"
OUTSIDE = Outside("shared", layers="decoder.block", norm="decoder.final_layer_norm")
LORA_TARGETS = ("q", "v")
# MindFormers 1.3.2, mindformers/models/t5/convert_weight.py.
RENAMES = (
    ("shared.weight", "t5_model.tfm_embedding_lookup.embedding_table"),
    ("encoder.final_layer_norm.weight", "t5_model.encoder_layernorm.gamma"),
    ("decoder.final_layer_norm.weight", "t5_model.decoder_layernorm.gamma"),
    ("encoder.block.", "t5_model.tfm_encoder.blocks."),
    ("decoder.block.", "t5_model.tfm_decoder.blocks."),
    (f".{POSITIONS}.weight", ".attention.bias_generator.embeddings_table"),
    *((f".{name}.", f".attention.dense{number}.") for number, name in enumerate(ATTENTION[:3], 1)),
    *((f".{name}.", f".cross_attention.dense{number}.") for number, name in enumerate(CROSS[:3], 1)),
    (f".{ATTENTION[3]}.", ".attention.projection."),
    (f".{CROSS[3]}.", ".cross_attention.projection."),
    (".layer.0.layer_norm.weight", ".layernorm1.gamma"),
    (".layer.1.layer_norm.weight", ".cross_attention_layernorm.gamma"),
    (".layer.2.layer_norm.weight", ".layernorm2.gamma"),
    *((f".layer.{place}.DenseReluDense.wi.", ".output.mapping.") for place in (1, 2)),
    *((f".layer.{place}.DenseReluDense.wo.", ".output.projection.") for place in (1, 2)),
)
TRANSPOSED = ("o", "wi", "wo")
FILES = FileNames(copies=tuple((f"{stack}.embed_tokens.weight", "shared.weight") for stack in ("encoder", "decoder")))


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read a T5 `config.json`; raises InputError naming every missing or impossible value."""
    values = HfConfig(config, where, KEYS, DEFAULTS)
    values.refuse("is_encoder_decoder", True)
    layers = _sizes(values)
    values.defaults["num_hidden_layers"] = layers
    form = ACTIVATIONS.get(values.get("activation", "relu"), "relu")
    is_scaled = values.flag("scale_decoder_outputs", values.flag("tie_word_embeddings"))
    encoder = Encoder(
        num_hidden_layers=layers,
        block=_block(1, form),
        cross=Cross("layer.1.layer_norm", CROSS[0], CROSS[1:3], CROSS[3]),
        positions=RelativePositions(POSITIONS, values.get("buckets"), values.get("max_distance")),
        start_id=values.get("decoder_start_token_id"),
        output_scale=values.get("hidden_size") ** -0.5 if is_scaled else 1.0,
        layers="encoder.block",
        norm="encoder.final_layer_norm",
    )
    return values.spec(
        "t5",
        tuple(ACTIVATIONS),
        block=_block(2, form),
        outside=OUTSIDE,
        rotary_dim=0,
        attention_scale=1.0,
        tie_word_embeddings=is_scaled,
        encoder=encoder,
    )


def _sizes(values: HfConfig) -> int:
    """The number of the encoder's layers; sizes that a decoder alone does not have are checked."""
    counts = {name: values.get(name) for name in ("num_layers", "buckets", "max_distance", "hidden_size")}
    problems = [
        f"{values.where}: '{values.shown(name)}' must be a whole number above 0, not {count!r:.80}"
        for name, count in counts.items()
        if type(count) is not int or count < 1
    ]
    start = values.get("decoder_start_token_id")
    if type(start) is not int or start < 0:
        problems.append(f"{values.where}: 'decoder_start_token_id' must be a token's number, not {start!r:.80}")
    if not problems and (counts["buckets"] < 4 or counts["max_distance"] <= counts["buckets"] // 2):
        problems.append(
            f"{values.where}: 'relative_attention_num_buckets' ({counts['buckets']}) must be 4 or more, and "
            f"'relative_attention_max_distance' ({counts['max_distance']}) more than half of it"
        )
    if not problems and counts["num_layers"] > MAX_LAYERS:
        problems.append(f"{values.where}: 'num_layers' is {counts['num_layers']}, more than {MAX_LAYERS}")
    if problems:
        raise InputError(*problems)
    return counts["num_layers"]


def _block(place: int, activation: str) -> Block:
    """A layer whose feed-forward stands at a place in it."""
    feed = f"layer.{place}.DenseReluDense"
    is_gated = activation != "relu"
    return Block(
        attention_norm="layer.0.layer_norm",
        project=ATTENTION[:3],
        merge=ATTENTION[3],
        feed_norm=f"layer.{place}.layer_norm",
        expand=(f"{feed}.wi_0", f"{feed}.wi_1") if is_gated else (f"{feed}.wi",),
        contract=f"{feed}.wo",
        activation=activation,
        is_gated=is_gated,
    )


def ckpt_layout(spec: ModelSpec) -> dict[str, CkptTensor]:
    """Return what the tensors of a CKPT hold; MindFormers' T5 has no gate, and models with one keep their names."""
    if spec.block.is_gated:
        return split_layout(spec, (), ())
    found = split_layout(spec, RENAMES, TRANSPOSED)
    return {_second_norm(name): held for name, held in found.items()}


def _second_norm(name: str) -> str:
    """An encoder's second norm is not that of cross-attention."""
    return name.replace("cross_attention_layernorm", "layernorm2") if ".tfm_encoder." in name else name


FAMILY = Family(
    "t5",
    "T5ForConditionalGeneration",
    spec_from_hf,
    LORA_TARGETS,
    MindFormersNames(layout=ckpt_layout),
    FILES,
    template="plain",
    is_encoder_decoder=True,
)
