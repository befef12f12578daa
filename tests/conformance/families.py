"""Tiny random models of every family, transformers' own classes with the same weights, and what both must agree on."""

import importlib
from dataclasses import replace

import numpy as np
import torch
from peft import PeftModel
from torch.nn.utils import parametrizations
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from msft.backend.contract import Batch, Lora, Optimizer, Runtime, Sampling, Tuning
from msft.convert.adapter import write_adapter
from msft.convert.merged import MergedTensors
from msft.models.families import spec_from_hf
from msft.models.shapes import linear_modules, tensor_shapes
from tests.conformance.chatglm1_equations import Equations
from tests.conformance.tiny_engines import Perturbed

VOCABULARY = 96
# Where answers begin, for the families that read what is before in both directions.
BEGIN = 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LIKE_LLAMA = {
    **SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY, "initializer_range": 0.2}
OPT = {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.2}
NEOX = {"intermediate_size": 48, "max_position_embeddings": 64, "layer_norm_eps": 1e-5, "tie_word_embeddings": False}
# Name -> the config.json. Windows are shorter than the texts, soft caps bend what they cap.
CONFIGS = {
    "llama": {"model_type": "llama", **LIKE_LLAMA},
    "mistral": {"model_type": "mistral", **LIKE_LLAMA, "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", **LIKE_LLAMA, "tie_word_embeddings": True},
    "qwen2, windows on the last layer": {
        "model_type": "qwen2",
        **LIKE_LLAMA,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **LIKE_LLAMA, "head_dim": 16},
    "gemma": {"model_type": "gemma", **LIKE_LLAMA, "tie_word_embeddings": True, "head_dim": 16, "hidden_act": "gelu"},
    "gemma2": {
        "model_type": "gemma2",
        **LIKE_LLAMA,
        "tie_word_embeddings": True,
        "head_dim": 16,
        "sliding_window": 7,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "phi3": {"model_type": "phi3", **LIKE_LLAMA, "sliding_window": 7},
    "phi3, three quarters turned": {"model_type": "phi3", **LIKE_LLAMA, "partial_rotary_factor": 0.75},
    "phi3, turned otherwise beyond 16 tokens": {
        "model_type": "phi3",
        **LIKE_LLAMA,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.5],
            "long_factor": [1.2, 2.0, 3.5, 6.0],
        },
    },
    "glm": {"model_type": "glm", **LIKE_LLAMA, "head_dim": 16},
    "glm4": {"model_type": "glm4", **LIKE_LLAMA, "head_dim": 16, "partial_rotary_factor": 0.5},
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES, **NEOX, "rotary_pct": 0.25, "hidden_act": "gelu"},
    "gpt_neox, one after the other": {
        "model_type": "gpt_neox",
        **SIZES,
        **NEOX,
        "rotary_pct": 0.5,
        "use_parallel_residual": False,
        "hidden_act": "gelu_new",
    },
    "opt": {"model_type": "opt", **SIZES, **OPT},
    "bloom": {"model_type": "bloom", "n_layer": 2, "n_head": 4, **SIZES},
    "falcon": {"model_type": "falcon", **SIZES},
    "falcon, groups of heads": {
        "model_type": "falcon",
        **SIZES,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
}
STATES = {**SIZES, "expand": 2, "conv_kernel": 4, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
STATES = {key: value for key, value in STATES.items() if key != "num_attention_heads"}
HEADS = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 5, "chunk_size": 8}
CONFIGS |= {
    "mamba": {"model_type": "mamba", **STATES, "state_size": 5, "time_step_rank": 3, "use_bias": True},
    "mamba2": {"model_type": "mamba2", **STATES, **HEADS},
    "mamba2, no biases": {
        "model_type": "mamba2",
        **STATES,
        **HEADS,
        "use_conv_bias": False,
        "tie_word_embeddings": False,
        "time_step_limit": [0.01, 0.9],
    },
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
CONFIGS |= {
    "mixtral": {"model_type": "mixtral", **LIKE_LLAMA, "num_local_experts": 5, "sliding_window": 7},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **LIKE_LLAMA,
        **EXPERTS,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **LIKE_LLAMA,
        **EXPERTS,
        "head_dim": 16,
        "num_experts": 6,
        "norm_topk_prob": True,
    },
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "initializer_factor": 0.6,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
}
CONFIGS |= {
    "t5": {"model_type": "t5", **T5},
    "t5, gated, with a head": {
        "model_type": "t5",
        **T5,
        "num_decoder_layers": 3,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
}
WITHOUT_GROUPS = {key: value for key, value in LIKE_LLAMA.items() if key != "num_key_value_heads"}
ALIBI = {key: value for key, value in WITHOUT_GROUPS.items() if key not in ("max_position_embeddings", "rope_theta")}
CHATGLM = {
    "padded_vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 64,
    "layernorm_epsilon": 1e-5,
    "rope_ratio": 3,
    "initializer_range": 0.2,
}
# Families of which transformers has no class, and the config of the class that computes the same.
CONFIGS |= {
    "internlm": {"model_type": "internlm", **WITHOUT_GROUPS, "bias": True},
    "internlm2": {"model_type": "internlm2", **LIKE_LLAMA, "bias": False},
    "internlm3": {"model_type": "internlm3", **LIKE_LLAMA, "qkv_bias": True, "bias": False, "head_dim": 16},
    "baichuan": {"model_type": "baichuan", **WITHOUT_GROUPS},
    "baichuan, ALiBi": {"model_type": "baichuan", **ALIBI, "model_max_length": 64},
    "baichuan, normed head": {"model_type": "baichuan", **WITHOUT_GROUPS},
    "chatglm": {"model_type": "chatglm", **CHATGLM},
}
# Its oracle is written from the equations.
CONFIGS |= {
    "chatglm1": {
        "model_type": "chatglm",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "inner_hidden_size": 48,
        "position_encoding_2d": True,
        "max_sequence_length": 64,
        "layernorm_epsilon": 1e-5,
        "initializer_range": 0.2,
        "bos_token_id": BEGIN,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "gmask_token_id": 9,
        "mask_token_id": 20,
    }
}
NATIVE = {
    "internlm": {"model_type": "llama", **WITHOUT_GROUPS, "attention_bias": True},
    "internlm2": {"model_type": "llama", **LIKE_LLAMA},
    "internlm3": {"model_type": "qwen2", **LIKE_LLAMA, "head_dim": 16},
    "baichuan": {"model_type": "llama", **WITHOUT_GROUPS},
    "baichuan, ALiBi": {"model_type": "llama", **WITHOUT_GROUPS},
    "baichuan, normed head": {"model_type": "llama", **WITHOUT_GROUPS},
    "chatglm": {"model_type": "glm", **LIKE_LLAMA, "head_dim": 16, "rope_theta": 30000.0},
}
# Families of which transformers has no class that computes the same.
BY_EQUATIONS = {"chatglm1": Equations}
OF_TRANSFORMERS = sorted(CONFIGS.keys() - NATIVE.keys() - BY_EQUATIONS.keys())
RUNTIME = Runtime(seed=3, max_grad_norm=1.0, optimizer=Optimizer(weight_decay=0.1, eps=1e-5))
LENGTH, UNSUPERVISED = 24, 5
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, BEGIN, 13], [20, 21, BEGIN]]


def spec_of(name):
    spec = spec_from_hf(CONFIGS[name])
    return replace(spec, is_head_normed=True) if name == "baichuan, normed head" else spec


def build(engine, name, tuning):
    spec = spec_of(name)
    module = importlib.import_module(f"msft.backend.{engine}.engine")
    return module.build(spec, Perturbed(spec, 0), tuning, RUNTIME)


def full(name):
    return Tuning(parameters=tuple(tensor_shapes(spec_of(name))))


def lora(name):
    return Tuning(lora=Lora(4, 8.0, 0.1, tuple(linear_modules(spec_of(name)))))


def oracle(name):
    """transformers' class with the same weights, its attention written out, without dropout."""
    config, spec = NATIVE.get(name, CONFIGS[name]), spec_of(name)
    if name in BY_EQUATIONS:
        source = Perturbed(spec, 0)
        return BY_EQUATIONS[name](config, {tensor: torch.from_numpy(source.read(tensor)) for tensor in source.tensors})
    kind = AutoModelForSeq2SeqLM if spec.encoder else AutoModelForCausalLM
    model = kind.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    if spec.encoder and not spec.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    source = Perturbed(spec, 0)
    weights = {name: torch.from_numpy(source.read(name)) for name in source.tensors}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = {f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")} if spec.encoder else set()
    assert not unexpected and set(missing) <= {spec.head, *tied}
    if not spec.encoder:
        model.tie_weights()
    model = model.float().eval()
    if spec.is_head_normed:
        parametrizations.weight_norm(model.lm_head, dim=0)
        # A row of the weight by its direction alone: its length (original0) is 1.
        model.lm_head.parametrizations.weight.original0.data.fill_(1)
    model.has_alibi = spec.has_alibi and name in NATIVE
    return model


def through_peft(name, engine, folder):
    """Logits of transformers' model with the engine's adapter, read by peft from what is written."""
    spec, tuning = spec_of(name), lora(name)
    write_adapter(folder, tuning.lora, engine.export_adapter(), "base", spec)
    adapted = PeftModel.from_pretrained(oracle(name), folder).eval()
    adapted.has_alibi = False
    return oracle_logits(adapted, batch()).detach().numpy()


def merged(name, engine, folder):
    """Logits of the engine on base weights into which msft has merged the adapter."""
    spec, tuning = spec_of(name), lora(name)
    arguments = Perturbed(spec, 0), tuning.lora, engine.export_adapter(), "adapter", None
    source = MergedTensors(*arguments, spec.block.is_transposed)
    module = importlib.import_module("msft.backend.torch.engine")
    return module.build(spec, source, Tuning(parameters=(spec.embedding,)), RUNTIME).logits(batch())


def batch(seed=0, rows=3, length=LENGTH):
    """Right-padded rows of random tokens, the first five unsupervised."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(length - 10, length + 1, rows)
    real = np.arange(length) < lengths[:, None]
    ids = np.where(real, generator.integers(1, VOCABULARY, (rows, length)), 0)
    ids[:, UNSUPERVISED] = BEGIN
    labels = np.where(
        real & (np.arange(length) >= UNSUPERVISED), generator.integers(1, VOCABULARY, (rows, length)), -100
    )
    positions = np.tile(np.arange(length), (rows, 1))
    arrays = (ids, labels, positions, real.astype(np.int32), np.arange(rows)[:, None] * real)
    return Batch(*(array.astype(np.int32) for array in arrays))


def packed(apart):
    """The two rows of a batch as one row of two segments."""
    segments = apart.segment_ids * np.array([[1], [2]], np.int32)
    arrays = apart.input_ids, apart.labels, apart.position_ids, segments, apart.row_ids
    return Batch(*(array.reshape(1, -1) for array in arrays))


def oracle_logits(model, one):
    mask = torch.from_numpy((one.segment_ids != 0).astype(np.int64))
    return _logits(model, torch.from_numpy(one.input_ids).long(), mask)


def _logits(model, ids, mask=None):
    if _has_encoder(model):
        return _of_targets(model, ids, mask)
    if not model.has_alibi:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # Llama at positions of 0, where nothing is turned, under a mask that adds BLOOM's ALiBi.
    rows, length = ids.shape
    slopes = build_alibi_tensor(torch.ones(rows, length), 4, torch.float32).view(rows, 4, 1, length)
    later = torch.full((length, length), -1e9).triu(1)
    return model(input_ids=ids, attention_mask=slopes + later, position_ids=ids * 0, use_cache=False).logits


def _has_encoder(model):
    return getattr(model.config, "is_encoder_decoder", False)


def _of_targets(model, ids, mask):
    """Logits of an encoder-decoder, whose rows are sources up to the first supervised position; 0 on these."""
    source, mask = ids[:, :UNSUPERVISED], torch.ones_like(ids) if mask is None else mask
    how = {"attention_mask": mask[:, :UNSUPERVISED], "use_cache": False}
    targets = model(input_ids=source, decoder_input_ids=ids[:, UNSUPERVISED:], **how).logits
    return torch.cat((targets.new_zeros(*source.shape, VOCABULARY), targets), 1)


def oracle_gradients(model, one):
    """Loss and gradients by canonical name; a head that is the embedding is in the embedding's."""
    labels = torch.from_numpy(one.labels).long().flatten()
    logits = oracle_logits(model, one).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    model.zero_grad()
    loss.backward()
    found = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    found.pop("lm_head.parametrizations.weight.original0", None)
    if "lm_head.parametrizations.weight.original1" in found:
        found["lm_head.weight"] = found.pop("lm_head.parametrizations.weight.original1")
    return loss.item(), found


def oracle_generation(model, count):
    """Greedy tokens without a cache, each prompt by itself."""
    found = []
    for prompt in PROMPTS:
        ids = [0] if _has_encoder(model) else list(prompt)
        start = len(ids)
        for _ in range(count):
            with torch.no_grad():
                whole = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([ids])}
                is_pair = _has_encoder(model)
                logits = model(**whole).logits if is_pair else _logits(model, torch.tensor([ids]))
            ids.append(int(logits[0, -1].argmax()))
        found.append(ids[start:])
    return found


def generation(engine, count):
    return engine.generate(PROMPTS, Sampling(max_new_tokens=count))


def steps(engine, count=3):
    """Losses and norms of steps of two micro-batches."""
    results = [engine.train_step([batch(2 * step), batch(2 * step + 1, rows=1)], 1e-3) for step in range(count)]
    return [(result.loss, result.grad_norm) for result in results]
