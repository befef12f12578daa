"""What the published sizes of a family have in common in their `config.json`."""

LLAMA2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
CHINESE = {**LLAMA2, "vocab_size": 55296, "bos_token_id": 1, "eos_token_id": 2}
YI = {**CHINESE, "vocab_size": 64000, "rope_theta": 5000000.0}
LLAMA3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}
LONGER = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 = {
    **LLAMA3,
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LONGER},
    "eos_token_id": [128001, 128008, 128009],
}
LLAMA32 = {
    **LLAMA31,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **LONGER},
    "tie_word_embeddings": True,
}
SMOLLM2 = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL = {"vocab_size": 32768, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0}
QWEN = {
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SMALL_QWEN = {**QWEN, "vocab_size": 151936, "tie_word_embeddings": True}
QWEN3 = {**QWEN, "vocab_size": 151936, "max_position_embeddings": 40960, "head_dim": 128}
SMALL_QWEN3 = {**QWEN3, "tie_word_embeddings": True}
MIXTRAL = {**MISTRAL, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN2_MOE = {
    **QWEN,
    "vocab_size": 151936,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}
QWEN3_MOE = {
    **QWEN3,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GEMMA = {
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": [1, 107],
    "pad_token_id": 0,
}
INTERNLM = {"vocab_size": 103168, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
INTERNLM2 = {
    "vocab_size": 92544,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "bias": False,
    "eos_token_id": [2, 92542],
}
INTERNLM3 = {
    "vocab_size": 128512,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000000.0,
    "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
    "head_dim": 128,
    "bias": False,
    "qkv_bias": False,
    "eos_token_id": 2,
}
BAICHUAN = {"vocab_size": 125696, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}
BAICHUAN_7B, BAICHUAN_13B = {"max_position_embeddings": 4096}, {"model_max_length": 4096}
CHATGLM = {
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_layers": 28,
    "num_attention_heads": 32,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 128,
    "seq_length": 32768,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "eos_token_id": 2,
}
CHATGLM1 = {
    "model_type": "chatglm",
    "vocab_size": 130528,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "num_layers": 28,
    "num_attention_heads": 32,
    "max_sequence_length": 2048,
    "layernorm_epsilon": 1e-5,
    "position_encoding_2d": True,
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "gmask_token_id": 130001,
    "mask_token_id": 130000,
    "pad_token_id": 3,
}
GLM = {
    "vocab_size": 151552,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}
GLM4 = {**GLM, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5}
PHI3 = {
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": 2047,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
# Without longrope's factors, which the release's own file has.
PHI3_LONG = {
    **PHI3,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 262144,
}
PHI4 = {
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000.0,
    "eos_token_id": 100265,
}
GPT2 = {"vocab_size": 50257, "n_positions": 1024, "bos_token_id": 50256, "eos_token_id": 50256}
NEOX = {
    "vocab_size": 50304,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "hidden_act": "gelu",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OPT = {"vocab_size": 50272, "max_position_embeddings": 2048, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
BLOOM = {"vocab_size": 250880, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
FALCON = {"vocab_size": 65024, "bias": False, "parallel_attn": True, "bos_token_id": 11, "eos_token_id": 11}
CODESTRAL = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "num_heads": 128,
    "n_groups": 8,
    "norm_before_gate": True,
}

T5 = {
    "vocab_size": 32128,
    "n_positions": 512,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
