"""Both engines over tiny random Llamas, transformers' own models with the same weights, and batches for them."""

import importlib
from functools import cache

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from msft.backend.contract import Batch, Lora, Optimizer, Runtime, Tuning
from msft.convert.random_weights import RandomWeights
from msft.models.families import spec_from_hf
from msft.models.shapes import linear_modules, tensor_shapes

ENGINES = ("torch", "mindspore")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TIED = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
UNTIED = {
    **TIED,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
    "head_dim": 16,
    "rope_scaling": LLAMA3,
}
CONFIGS = {"tied": TIED, "untied": UNTIED}
RUNTIME = Runtime(seed=3, max_grad_norm=1.0, optimizer=Optimizer(weight_decay=0.1))
LENGTH = 20


class Perturbed(RandomWeights):
    """Random weights whose norms and biases are not ones and zeros, so that a wrong one shows."""

    def read(self, name):
        array = super().read(name)
        if array.ndim == 1:
            array = array + np.random.default_rng(len(name)).normal(0, 0.2, array.shape).astype(np.float32)
        return array


def spec_of(config):
    return spec_from_hf(config)


def attention_modules(config):
    names_of_all = linear_modules(spec_of(config))
    return tuple(name for name in names_of_all if name.endswith(("q_proj", "v_proj", "down_proj")))


def lora(config, dropout=0.0):
    return Tuning(lora=Lora(4, 8.0, dropout, attention_modules(config)))


def full(config):
    return Tuning(parameters=tuple(tensor_shapes(spec_of(config))))


def build(engine, config, tuning, runtime=RUNTIME):
    module = importlib.import_module(f"msft.backend.{engine}.engine")
    return module.build(spec_of(config), Perturbed(spec_of(config), 0), tuning, runtime)


@cache
def _built(engine, kind, tuning):
    config = CONFIGS[kind]
    tunings = {"lora": lora(config), "lora with dropout": lora(config, dropout=0.1), "full": full(config)}
    built = build(engine, config, tunings[tuning])
    return built, built.export_state()


def shared(engine, kind, tuning):
    """An engine as it is at its start; it is built once and set back, for compiling one costs seconds."""
    built, start = _built(engine, kind, tuning)
    built.import_state(start)
    return built


def oracle(config):
    """transformers' own model with the same weights."""
    keys = {key: value for key, value in config.items() if key not in ("model_type", "rope_theta", "rope_scaling")}
    rope = {"rope_theta": config["rope_theta"], **(config.get("rope_scaling") or {"rope_type": "default"})}
    model = LlamaForCausalLM(LlamaConfig(**keys, rope_parameters=rope))
    source = Perturbed(spec_of(config), 0)
    weights = {name: torch.from_numpy(source.read(name)) for name in source.tensors}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def batch(seed=0, rows=3, padding=True):
    """Right-padded rows of random tokens, the first five unsupervised."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(10, LENGTH + 1, rows) if padding else np.full(rows, LENGTH)
    real = np.arange(LENGTH) < lengths[:, None]
    ids = np.where(real, generator.integers(1, 96, (rows, LENGTH)), 0)
    labels = np.where(real & (np.arange(LENGTH) >= 5), generator.integers(1, 96, (rows, LENGTH)), -100)
    positions = np.tile(np.arange(LENGTH), (rows, 1))
    arrays = (ids, labels, positions, real.astype(np.int32), np.arange(rows)[:, None] * real)
    return Batch(*(array.astype(np.int32) for array in arrays))


def oracle_loss(model, micro_batches):
    """Summed cross-entropy over the supervised tokens, divided by their number over all micro-batches."""
    total, count = 0.0, 0
    for one in micro_batches:
        logits = model(input_ids=torch.from_numpy(one.input_ids).long(), use_cache=False).logits
        labels = torch.from_numpy(one.labels).long().flatten()
        entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum")
        total = total + entropy
        count += one.supervised
    return total / count


def micro_batches(step):
    """Two micro-batches of unequal numbers of supervised tokens."""
    return [batch(2 * step, rows=3), batch(2 * step + 1, rows=1)]


def run(engine, steps, start=0, rate=1e-2):
    results = [engine.train_step(micro_batches(step), rate) for step in range(start, start + steps)]
    return np.array([(result.loss, result.grad_norm) for result in results])
