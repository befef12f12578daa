"""The `model` block: a Hugging Face folder, or the sizes of MindFormers 1.3.2's LlamaConfig; and `pet_config`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from msft.config.block import Block
from msft.config.markers import (
    Count,
    Dtype,
    NotNegative,
    Number,
    Positive,
    PositiveNumber,
    Refused,
    Share,
    Switch,
    Texts,
    Unused,
    Whole,
)

Kernels = Annotated[Any, Unused("the engine picks the kernels of the device itself")]
Layout = Annotated[Any, Unused("the weights are not split over processes")]
Paged = Annotated[Any, Unused("generation keeps a plain key-value cache")]
Adapter = Annotated[Any, Unused("adapters are float32 and start as MindFormers' really do: A HeUniform, B zero")]


def _refused(why: str, *neutral: Any) -> Any:
    return Annotated[Any, Refused(why, neutral)]


class PetConfig(Block):
    """What is tuned with adapters (MindFormers' LoraConfig, its defaults)."""

    pet_type: Literal["lora"] = "lora"
    lora_rank: Positive = 8
    lora_alpha: PositiveNumber = 16.0
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.01
    target_modules: Texts | None = None
    exclude_layers: Texts = []
    freeze_include: Texts = []
    freeze_exclude: Texts = []
    lora_a_init: Adapter = None
    lora_b_init: Adapter = None
    param_init_type: Adapter = None
    compute_dtype: Adapter = None


class ModelKeys(Block):
    """The keys that do not describe the architecture: precision, adapters, generation.

    `moe_aux_loss_coef` adds the balance loss of routed experts to the loss, times that; unset, there is none.
    """

    seq_length: Positive = 2048
    moe_aux_loss_coef: NotNegative | None = None
    compute_dtype: Dtype | None = None
    layernorm_compute_type: Dtype | None = None
    softmax_compute_type: Dtype | None = None
    rotary_dtype: Dtype | None = None
    param_init_type: Dtype | None = None
    pet_config: PetConfig | None = None
    do_sample: Switch = False
    temperature: NotNegative = 1.0
    top_k: Count = 0
    top_p: Annotated[Share, Field(gt=0)] = 1.0
    max_new_tokens: Positive | None = None
    max_decode_length: Positive | None = None
    repetition_penalty: _refused("a repetition penalty is not built", 1, 1.0) = None


class ModelConfig(ModelKeys):
    """MindFormers' LlamaConfig; unset sizes are its defaults (Llama 2 7B)."""

    type: Literal["LlamaConfig"] = "LlamaConfig"
    hidden_size: Positive = 4096
    num_layers: Positive = 32
    num_heads: Positive = 32
    n_kv_heads: Positive | None = None
    vocab_size: Positive = 32000
    multiple_of: Positive = 256
    ffn_dim_multiplier: PositiveNumber | None = None
    intermediate_size: Positive | None = None
    rms_norm_eps: PositiveNumber = 1e-5
    max_position_embedding: Positive | None = None
    theta: PositiveNumber = 10000.0
    rope_scaling: dict[str, Any] | None = None
    qkv_has_bias: Switch = False
    tie_word_embeddings: Switch = False
    initializer_range: PositiveNumber = 0.02
    bos_token_id: Count = 1
    eos_token_id: Count = 2
    pad_token_id: Whole = 0
    compute_dtype: Dtype | None = "float16"
    layernorm_compute_type: Dtype | None = "float32"
    softmax_compute_type: Dtype | None = "float32"
    rotary_dtype: Dtype | None = "float32"
    param_init_type: Dtype | None = "float16"
    checkpoint_name_or_path: str = ""
    do_sample: Switch = True
    top_k: Count = 5
    max_decode_length: Positive | None = 1024

    ignore_token_id: _refused("labels that do not count are always -100", -100) = None
    extend_method: _refused("write a longer context as rope_scaling", "None", "", None) = None
    scaling_factor: _refused("write a longer context as rope_scaling", 1, 1.0) = None
    quant_config: _refused("quantized models are not built", None) = None
    quantization_config: _refused("quantized models are not built", None) = None
    moe_config: _refused("experts need the model's own family (model.pretrained)", None) = None
    parallel_decoding_params: _refused("parallel decoding is not built", None) = None

    batch_size: Annotated[Any, Unused("the batch size of prediction is predict_batch_size")] = None
    embedding_init_type: Annotated[Any, Unused("embeddings have the dtype param_init_type")] = None
    use_past: Annotated[Any, Unused("generation always keeps keys and values")] = None
    use_flash_attention: Kernels = None
    use_ring_attention: Kernels = None
    use_attn_mask_compression: Kernels = None
    use_rope_slice: Kernels = None
    fused_rms_norm: Kernels = None
    qkv_concat: Annotated[Any, Unused("q, k and v are always separate; concatenated weights are split on load")] = None
    llm_backend: Kernels = None
    fine_grain_interleave: Layout = None
    pp_interleave_num: Layout = None
    parallel_optimizer: Layout = None
    parallel_config: Layout = None
    offset: Layout = None
    is_dynamic: Paged = None
    block_size: Paged = None
    num_blocks: Paged = None


class Arch(Block):
    """Which network is built from the sizes."""

    type: Literal["LlamaForCausalLM"] = "LlamaForCausalLM"


class Model(ModelKeys):
    """`pretrained` names a Hugging Face folder; `config` is the YAML key `model_config`. One of the two.

    The keys of ModelKeys stand here beside `pretrained`, and inside `model_config` otherwise.
    """

    pretrained: str = ""
    config: ModelConfig | None = Field(default=None, alias="model_config")
    arch: Arch = Arch()


class Tokenizer(Block):
    """`vocab_file` is a sentencepiece model or a tokenizer.json; unset, the tokenizer of `model.pretrained`."""

    vocab_file: str = ""
    type: Annotated[Any, Unused("the kind of tokenizer is seen from its file")] = None
    unk_token: Annotated[Any, Unused("special tokens are the tokenizer file's own")] = None
    bos_token: Annotated[Any, Unused("special tokens are the tokenizer file's own")] = None
    eos_token: Annotated[Any, Unused("special tokens are the tokenizer file's own")] = None
    pad_token: Annotated[Any, Unused("special tokens are the tokenizer file's own")] = None
    add_bos_token: Annotated[Any, Unused("the template decides about begin and end tokens")] = None
    add_eos_token: Annotated[Any, Unused("the template decides about begin and end tokens")] = None
    tokenizer_file: Annotated[Any, Unused("name the tokenizer in vocab_file")] = None


class Processor(Block):
    """MindFormers' processor, of which the tokenizer's file matters."""

    tokenizer: Tokenizer = Tokenizer()
    type: Annotated[Any, Unused("there is one kind of processor")] = None
    return_tensors: Annotated[Any, Unused("batches are always numpy")] = None
