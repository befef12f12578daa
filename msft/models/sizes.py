"""The published sizes of each family: what a release's `config.json` says, as on its Hugging Face page."""

from typing import NamedTuple

from msft.errors import InputError, did_you_mean
from msft.models import common_values as common
from msft.models.families import named


class Size(NamedTuple):
    """A published size: the release that recipes start from, and what its `config.json` says of its own."""

    release: str
    values: dict


def _like_llama(shared: dict, release: str, *sizes: int, **more) -> Size:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    return Size(release, {**shared, **dict(zip(names, sizes, strict=False)), **more})


def _gpt2(release: str, width: int, layers: int, heads: int) -> Size:
    return Size(release, {**common.GPT2, "n_embd": width, "n_layer": layers, "n_head": heads})


def _pythia(name: str, width: int, layers: int, heads: int, vocabulary: int = 50304) -> Size:
    return _like_llama(common.NEOX, f"pythia-{name}", width, 4 * width, layers, heads, vocab_size=vocabulary)


def _opt(release: str, width: int, layers: int, heads: int) -> Size:
    own = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    return Size(release, {**common.OPT, **own, "num_hidden_layers": layers, "num_attention_heads": heads})


def _bloom(release: str, width: int, layers: int, heads: int) -> Size:
    return Size(release, {**common.BLOOM, "hidden_size": width, "n_layer": layers, "n_head": heads})


def _falcon(release: str, width: int, layers: int, heads: int, **more) -> Size:
    own = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return Size(release, {**common.FALCON, **own, **more})


def _t5(release: str, width: int, wide: int, layers: int, heads: int, head_dim: int = 64, **more) -> Size:
    own = {"d_model": width, "d_ff": wide, "num_layers": layers, "num_heads": heads, "d_kv": head_dim}
    return Size(release, {**common.T5, **own, **more})


def _flan_t5(release: str, width: int, wide: int, layers: int, heads: int) -> Size:
    gate = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return _t5(release, width, wide, layers, heads, **gate, num_decoder_layers=layers)


# By `model_type` and size. Hidden size, feed-forward size, layers, heads, key heads.
def _mamba(size: str, hidden: int, layers: int) -> Size:
    values = {"vocab_size": 50280, "hidden_size": hidden, "num_hidden_layers": layers, "state_size": 16}
    return Size(f"mamba-{size}-hf", {**values, "time_step_rank": hidden // 16, "intermediate_size": 2 * hidden})


def _mamba2(size: str, hidden: int, layers: int) -> Size:
    """As Hugging Face's script converts the authors' releases, which have no config.json that transformers reads."""
    sizes = {"vocab_size": 50288, "hidden_size": hidden, "num_hidden_layers": layers, "num_heads": hidden // 32}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return Size(f"mamba2-{size}", {**sizes, "n_groups": 1, "tie_word_embeddings": True, **ends})


SIZES: dict[str, dict[str, Size]] = {
    "llama": {
        "llama2-7b": _like_llama(common.LLAMA2, "Llama-2-7b-hf", 4096, 11008, 32, 32, 32),
        "llama2-13b": _like_llama(common.LLAMA2, "Llama-2-13b-hf", 5120, 13824, 40, 40, 40),
        "llama2-70b": _like_llama(common.LLAMA2, "Llama-2-70b-hf", 8192, 28672, 80, 64, 8),
        "llama3-8b": _like_llama(common.LLAMA3, "Meta-Llama-3-8B-Instruct", 4096, 14336, 32, 32, 8),
        "llama3-70b": _like_llama(common.LLAMA3, "Meta-Llama-3-70B-Instruct", 8192, 28672, 80, 64, 8),
        "llama3.1-8b": _like_llama(common.LLAMA31, "Llama-3.1-8B-Instruct", 4096, 14336, 32, 32, 8),
        "llama3.1-70b": _like_llama(common.LLAMA31, "Llama-3.1-70B-Instruct", 8192, 28672, 80, 64, 8),
        "llama3.2-1b": _like_llama(common.LLAMA32, "Llama-3.2-1B-Instruct", 2048, 8192, 16, 32, 8, head_dim=64),
        "llama3.2-3b": _like_llama(common.LLAMA32, "Llama-3.2-3B-Instruct", 3072, 8192, 28, 24, 8, head_dim=128),
        "vicuna-7b": _like_llama(common.LLAMA2, "vicuna-7b-v1.5", 4096, 11008, 32, 32, 32),
        "vicuna-13b": _like_llama(common.LLAMA2, "vicuna-13b-v1.5", 5120, 13824, 40, 40, 40),
        "chinese-alpaca2-7b": _like_llama(common.CHINESE, "chinese-alpaca-2-7b", 4096, 11008, 32, 32, 32),
        "chinese-alpaca2-13b": _like_llama(common.CHINESE, "chinese-alpaca-2-13b", 5120, 13824, 40, 40, 40),
        "yi-6b": _like_llama(common.YI, "Yi-6B-Chat", 4096, 11008, 32, 32, 4),
        "yi-34b": _like_llama(common.YI, "Yi-34B-Chat", 7168, 20480, 60, 56, 8),
        "tinyllama-1.1b": _like_llama(
            common.LLAMA2, "TinyLlama-1.1B-Chat-v1.0", 2048, 5632, 22, 32, 4, max_position_embeddings=2048
        ),
        "smollm2-135m": _like_llama(common.SMOLLM2, "SmolLM2-135M-Instruct", 576, 1536, 30, 9, 3),
    },
    "mistral": {
        "7b-v0.1": _like_llama(
            common.MISTRAL,
            "Mistral-7B-Instruct-v0.1",
            *(4096, 14336, 32, 32, 8),
            vocab_size=32000,
            rope_theta=10000.0,
            sliding_window=4096,
        ),
        "7b-v0.3": _like_llama(common.MISTRAL, "Mistral-7B-Instruct-v0.3", 4096, 14336, 32, 32, 8),
    },
    "qwen2": {
        "0.5b": _like_llama(common.SMALL_QWEN, "Qwen2.5-0.5B-Instruct", 896, 4864, 24, 14, 2),
        "1.5b": _like_llama(common.SMALL_QWEN, "Qwen2.5-1.5B-Instruct", 1536, 8960, 28, 12, 2),
        "3b": _like_llama(common.SMALL_QWEN, "Qwen2.5-3B-Instruct", 2048, 11008, 36, 16, 2),
        "7b": _like_llama(common.QWEN, "Qwen2.5-7B-Instruct", 3584, 18944, 28, 28, 4),
        "14b": _like_llama(common.QWEN, "Qwen2.5-14B-Instruct", 5120, 13824, 48, 40, 8),
        "32b": _like_llama(common.QWEN, "Qwen2.5-32B-Instruct", 5120, 27648, 64, 40, 8),
        "72b": _like_llama(common.QWEN, "Qwen2.5-72B-Instruct", 8192, 29568, 80, 64, 8),
        "qwen1.5-1.8b": _like_llama(common.QWEN, "Qwen1.5-1.8B-Chat", 2048, 5504, 24, 16, 16, vocab_size=151936),
        "qwen1.5-7b": _like_llama(common.QWEN, "Qwen1.5-7B-Chat", 4096, 11008, 32, 32, 32, vocab_size=151936),
        "qwen1.5-14b": _like_llama(common.QWEN, "Qwen1.5-14B-Chat", 5120, 13696, 40, 40, 40),
        "qwen1.5-72b": _like_llama(common.QWEN, "Qwen1.5-72B-Chat", 8192, 24576, 80, 64, 64),
    },
    "qwen3": {
        "0.6b": _like_llama(common.SMALL_QWEN3, "Qwen3-0.6B", 1024, 3072, 28, 16, 8),
        "1.7b": _like_llama(common.SMALL_QWEN3, "Qwen3-1.7B", 2048, 6144, 28, 16, 8),
        "4b": _like_llama(common.SMALL_QWEN3, "Qwen3-4B", 2560, 9728, 36, 32, 8),
        "8b": _like_llama(common.QWEN3, "Qwen3-8B", 4096, 12288, 36, 32, 8),
        "14b": _like_llama(common.QWEN3, "Qwen3-14B", 5120, 17408, 40, 40, 8),
        "32b": _like_llama(common.QWEN3, "Qwen3-32B", 5120, 25600, 64, 64, 8),
    },
    "gemma": {
        "2b": _like_llama(common.GEMMA, "gemma-2b-it", 2048, 16384, 18, 8, 1),
        "7b": _like_llama(common.GEMMA, "gemma-7b-it", 3072, 24576, 28, 16, 16),
    },
    "gemma2": {
        "2b": _like_llama(common.GEMMA, "gemma-2-2b-it", 2304, 9216, 26, 8, 4),
        "9b": _like_llama(common.GEMMA, "gemma-2-9b-it", 3584, 14336, 42, 16, 8),
        "27b": _like_llama(
            common.GEMMA, "gemma-2-27b-it", 4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144
        ),
    },
    "internlm": {
        "7b": _like_llama(
            common.INTERNLM, "internlm-chat-7b", 4096, 11008, 32, 32, 32, max_position_embeddings=2048, bias=True
        ),
        "20b": _like_llama(
            common.INTERNLM, "internlm-chat-20b", 5120, 13824, 60, 40, 40, max_position_embeddings=4096, bias=False
        ),
    },
    "internlm2": {
        "7b": _like_llama(common.INTERNLM2, "internlm2-chat-7b", 4096, 14336, 32, 32, 8),
        "20b": _like_llama(common.INTERNLM2, "internlm2-chat-20b", 6144, 16384, 48, 48, 8),
    },
    "internlm3": {"8b": _like_llama(common.INTERNLM3, "internlm3-8b-instruct", 4096, 10240, 48, 32, 2)},
    "baichuan": {
        "1-7b": _like_llama(
            {**common.BAICHUAN, **common.BAICHUAN_7B}, "Baichuan-7B", 4096, 11008, 32, 32, vocab_size=64000
        ),
        "1-13b": _like_llama(
            {**common.BAICHUAN, **common.BAICHUAN_13B}, "Baichuan-13B-Chat", 5120, 13696, 40, 40, vocab_size=64000
        ),
        "2-7b": _like_llama({**common.BAICHUAN, **common.BAICHUAN_7B}, "Baichuan2-7B-Chat", 4096, 11008, 32, 32),
        "2-13b": _like_llama({**common.BAICHUAN, **common.BAICHUAN_13B}, "Baichuan2-13B-Chat", 5120, 13696, 40, 40),
    },
    "chatglm1": {"6b": Size("chatglm-6b", common.CHATGLM1)},
    "chatglm": {
        "2-6b": Size("chatglm2-6b", common.CHATGLM),
        "3-6b": Size("chatglm3-6b", {**common.CHATGLM, "seq_length": 8192}),
        "4-9b": Size(
            "glm-4-9b-chat",
            {
                **common.CHATGLM,
                "padded_vocab_size": 151552,
                "num_layers": 40,
                "seq_length": 131072,
                "layernorm_epsilon": 1.5625e-07,
                "rope_ratio": 500,
                "eos_token_id": [151329, 151336, 151338],
                "pad_token_id": 151329,
            },
        ),
    },
    "glm": {"9b": _like_llama(common.GLM, "glm-4-9b-chat-hf", 4096, 13696, 40, 32)},
    "glm4": {
        "9b": _like_llama(common.GLM4, "GLM-4-9B-0414", 4096, 13696, 40, 32),
        "32b": _like_llama(common.GLM4, "GLM-4-32B-0414", 6144, 23040, 61, 48, attention_bias=False),
    },
    "phi3": {
        "3-mini": _like_llama(common.PHI3, "Phi-3-mini-4k-instruct", 3072, 8192, 32, 32, 32),
        "3-medium": _like_llama(common.PHI3, "Phi-3-medium-4k-instruct", 5120, 17920, 40, 40, 10),
        "3-mini-128k": _like_llama(common.PHI3_LONG, "Phi-3-mini-128k-instruct", 3072, 8192, 32, 32, 32),
        "3-medium-128k": _like_llama(common.PHI3_LONG, "Phi-3-medium-128k-instruct", 5120, 17920, 40, 40, 10),
        "3.5-mini": _like_llama(common.PHI3_LONG, "Phi-3.5-mini-instruct", 3072, 8192, 32, 32, 32),
        "4": _like_llama(common.PHI4, "phi-4", 5120, 17920, 40, 40, 10),
    },
    "gpt2": {
        "124m": _gpt2("gpt2", 768, 12, 12),
        "355m": _gpt2("gpt2-medium", 1024, 24, 16),
        "774m": _gpt2("gpt2-large", 1280, 36, 20),
        "1.5b": _gpt2("gpt2-xl", 1600, 48, 25),
    },
    "gpt_neox": {
        "70m": _pythia("70m", 512, 6, 8),
        "160m": _pythia("160m", 768, 12, 12),
        "410m": _pythia("410m", 1024, 24, 16),
        "1b": _pythia("1b", 2048, 16, 8),
        "1.4b": _pythia("1.4b", 2048, 24, 16),
        "2.8b": _pythia("2.8b", 2560, 32, 32),
        "6.9b": _pythia("6.9b", 4096, 32, 32, 50432),
        "12b": _pythia("12b", 5120, 36, 40, 50688),
    },
    "opt": {
        "125m": _opt("opt-125m", 768, 12, 12),
        "1.3b": _opt("opt-1.3b", 2048, 24, 32),
        "2.7b": _opt("opt-2.7b", 2560, 32, 32),
        "6.7b": _opt("opt-6.7b", 4096, 32, 32),
        "13b": _opt("opt-13b", 5120, 40, 40),
    },
    "bloom": {
        "560m": _bloom("bloom-560m", 1024, 24, 16),
        "1b1": _bloom("bloom-1b1", 1536, 24, 16),
        "1b7": _bloom("bloom-1b7", 2048, 24, 16),
        "3b": _bloom("bloom-3b", 2560, 30, 32),
        "7b1": _bloom("bloom-7b1", 4096, 30, 32),
    },
    "mamba": {
        "130m": _mamba("130m", 768, 24),
        "370m": _mamba("370m", 1024, 48),
        "790m": _mamba("790m", 1536, 48),
        "1.4b": _mamba("1.4b", 2048, 48),
        "2.8b": _mamba("2.8b", 2560, 64),
    },
    "mamba2": {
        "130m": _mamba2("130m", 768, 24),
        "370m": _mamba2("370m", 1024, 48),
        "780m": _mamba2("780m", 1536, 48),
        "1.3b": _mamba2("1.3b", 2048, 48),
        "2.7b": _mamba2("2.7b", 2560, 64),
        "codestral-7b": Size("Mamba-Codestral-7B-v0.1", common.CODESTRAL),
    },
    "falcon": {
        "7b": _falcon("falcon-7b-instruct", 4544, 32, 71, multi_query=True),
        "40b": _falcon("falcon-40b-instruct", 8192, 60, 128, num_kv_heads=8, new_decoder_architecture=True),
    },
    "mixtral": {
        "8x7b": _like_llama(common.MIXTRAL, "Mixtral-8x7B-Instruct-v0.1", 4096, 14336, 32, 32, 8),
        "8x22b": _like_llama(
            {**common.MIXTRAL, "vocab_size": 32768, "max_position_embeddings": 65536},
            "Mixtral-8x22B-Instruct-v0.1",
            *(6144, 16384, 56, 48, 8),
        ),
    },
    "qwen2_moe": {
        "1.5-a2.7b": _like_llama(
            common.QWEN2_MOE, "Qwen1.5-MoE-A2.7B-Chat", 2048, 5632, 24, 16, 16, max_position_embeddings=8192
        ),
        "57b-a14b": _like_llama(
            common.QWEN2_MOE,
            "Qwen2-57B-A14B-Instruct",
            *(3584, 18944, 28, 28, 4),
            num_experts=64,
            num_experts_per_tok=8,
            moe_intermediate_size=2560,
            shared_expert_intermediate_size=20480,
        ),
    },
    "qwen3_moe": {
        "30b-a3b": _like_llama(common.QWEN3_MOE, "Qwen3-30B-A3B", 2048, 6144, 48, 32, 4),
        "235b-a22b": _like_llama(
            common.QWEN3_MOE, "Qwen3-235B-A22B", 4096, 12288, 94, 64, 4, moe_intermediate_size=1536
        ),
    },
    "t5": {
        "small": _t5("t5-small", 512, 2048, 6, 8),
        "base": _t5("t5-base", 768, 3072, 12, 12),
        "large": _t5("t5-large", 1024, 4096, 24, 16),
        "3b": _t5("t5-3b", 1024, 16384, 24, 32, 128),
        "11b": _t5("t5-11b", 1024, 65536, 24, 128, 128),
        "flan-small": _flan_t5("flan-t5-small", 512, 1024, 8, 6),
        "flan-base": _flan_t5("flan-t5-base", 768, 2048, 12, 12),
        "flan-large": _flan_t5("flan-t5-large", 1024, 2816, 24, 16),
        "flan-xl": _flan_t5("flan-t5-xl", 2048, 5120, 24, 32),
        "flan-xxl": _flan_t5("flan-t5-xxl", 4096, 10240, 24, 64),
    },
}


def published(name: str, size: str, where: str = "--size") -> Size:
    """Return a published size of a family; raises InputError naming the known ones."""
    sizes = SIZES.get(named(name).model_type, {})
    if size not in sizes:
        known = ", ".join(sizes) or "none"
        raise InputError(f"{where}: {name} has no size {size!r:.80}{did_you_mean(size, sizes)} (known: {known})")
    return sizes[size]


def config_of(name: str, size: Size) -> dict:
    """Return a size's `config.json`."""
    kind = named(name)
    return {"architectures": [kind.architecture], "model_type": kind.model_type, **size.values}
