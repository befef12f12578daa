"""ChatGLM2, ChatGLM3 and GLM-4 9B as released with their own code; transformers' GLM computes them.

The first generation has the same `model_type`, and a file of its own.
"""

from msft.models import chatglm1, glm, llama
from msft.models.family import CkptTensor, Family, FileNames, MindFormersNames
from msft.models.hf_config import HfConfig
from msft.models.spec import ModelSpec

KEYS = {
    "vocab_size": "padded_vocab_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "max_position_embeddings": "seq_length",
    "norm_eps": "layernorm_epsilon",
}
FILES = FileNames(
    renames=(
        ("model.embed_tokens.", "transformer.embedding.word_embeddings."),
        ("model.layers.", "transformer.encoder.layers."),
        (".self_attn.o_proj.", ".self_attention.dense."),
        (".mlp.gate_up_proj.", ".mlp.dense_h_to_4h."),
        (".mlp.down_proj.", ".mlp.dense_4h_to_h."),
        ("model.norm.", "transformer.encoder.final_layernorm."),
        ("lm_head.", "transformer.output_layer."),
    ),
    fused={"self_attention.query_key_value": llama.ATTENTION[:3]},
)

EMBEDDING = (".word_embeddings.weight", ".embedding_weight")
# What it was called before 1.3.
OLD_EMBEDDING = (".embedding_table", ".embedding_weight")


def spec_from_hf(config: dict, where: str = "config.json") -> ModelSpec:
    """Read the `config.json` of any ChatGLM or GLM-4; raises InputError naming every impossible value."""
    if chatglm1.is_meant(config):
        return chatglm1.spec_from_hf(config, where)
    values = HfConfig(config, where, KEYS)
    values.refuse("multi_query_attention", True)
    values.refuse("rmsnorm", True)
    values.refuse("original_rope", True)
    values.refuse("post_layer_norm", True)
    values.refuse("add_bias_linear", False)
    values.refuse("apply_residual_connection_post_layernorm", False)
    biased = llama.ATTENTION[:3] if values.flag("add_qkv_bias", True) else ()
    theta = 10000.0 * values.number("rope_ratio", 1.0)
    return glm.described(values, "chatglm", glm.BLOCK, biased, rope_theta=theta)


def ckpt_layout(spec: ModelSpec) -> dict[str, CkptTensor]:
    """Return what MindFormers' tensors hold: its files' names and joined matrices, but for the embedding's name.

    MindFormers 1.3.2, mindformers/models/glm2/convert_weight.py.
    """
    found = FILES.tensors(spec)
    return {name.replace(*EMBEDDING): CkptTensor(parts) for name, parts in found.items()}


def native(spec: ModelSpec) -> dict:
    """Return the config.json of the GLM that this is."""
    config = {**llama.config_of(spec), "model_type": "glm"}
    config["rope_parameters"]["partial_rotary_factor"] = spec.rotary_dim / spec.head_dim
    return config


MINDFORMERS = MindFormersNames(layout=ckpt_layout, aliases=(OLD_EMBEDDING,))
FAMILY = Family(
    "chatglm", "ChatGLMModel", spec_from_hf, llama.LORA_TARGETS, MINDFORMERS, FILES, native=native, template="chatglm3"
)
