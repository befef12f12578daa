"""msft merge: the merged model is peft's, whatever is merged into what."""

import json
import os

import numpy as np
import pytest
import torch

from msft.backend.contract import Lora
from msft.cli.merge import main
from msft.convert.adapter import write_adapter
from msft.convert.ckpt import CkptWriter
from msft.convert.dtypes import Cast
from msft.convert.open import open_weights
from msft.convert.random_weights import RandomWeights
from msft.convert.source import TensorInfo
from msft.convert.weights import write_ckpt, write_hf_folder
from msft.models import llama
from msft.models.adapters import peft_names, peft_to_mindformers
from msft.models.families import spec_from_hf
from msft.models.shapes import linear_modules, tensor_shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPEC = spec_from_hf(CONFIG)
MODULES = tuple(module for module in linear_modules(SPEC) if not module.endswith("k_proj"))
LORA = Lora(4, 6.0, 0.1, MODULES)


@pytest.fixture
def base(tmp_path):
    write_hf_folder(RandomWeights(SPEC, 0), SPEC, tmp_path / "base", companions={"tokenizer.json": b"{}"})
    return tmp_path / "base"


def factors():
    rng, result = np.random.default_rng(0), {}
    for module in MODULES:
        rows, columns = tensor_shapes(SPEC)[f"{module}.weight"]
        first, second = peft_names(module)
        result[first] = rng.normal(size=(4, columns)).astype(np.float32)
        result[second] = rng.normal(size=(rows, 4)).astype(np.float32)
    return result


@pytest.fixture
def adapter(tmp_path, base):
    write_adapter(tmp_path / "adapter", LORA, factors(), str(base), SPEC)
    return tmp_path / "adapter"


def merge(base, adapter, output, *more) -> int:
    return main(["--model", str(base), "--adapter", str(adapter), "--output_path", str(output), *more])


def test_the_merged_model_has_the_adapters_logits(base, adapter, tmp_path, capsys):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    assert merge(base, adapter, tmp_path / "merged") == 0
    assert "12 modules merged with alpha 6 / rank 4" in capsys.readouterr().out
    ids = torch.arange(60).reshape(2, 30)
    tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        difference = (tuned(ids).logits - merged(ids).logits).abs().max()
        scale = tuned(ids).logits.abs().max()
        with tuned.disable_adapter():
            moved = (tuned(ids).logits - merged(ids).logits).abs().max()
    assert difference < 1e-5 * scale and moved > 0.1 * scale
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == b"{}"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["num_attention_heads"] == 4


@pytest.mark.parametrize(("word", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, torch.float32)])
def test_every_tensor_equals_the_formula(base, adapter, tmp_path, word, dtype):
    """W + alpha / rank * B A in float32, rounded once."""
    from safetensors.torch import load_file

    assert merge(base, adapter, tmp_path / "merged", *(["--dtype", word] if word else [])) == 0
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    weights = factors()
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module in MODULES:
            first, second = (torch.from_numpy(weights[factor]) for factor in peft_names(module))
            exact = tensor.double() + 6.0 / 4 * (second.double() @ first.double())
            step = torch.finfo(dtype).eps * exact.abs() + 1e-6
            assert ((after[name].double() - exact).abs() <= step).all(), name
        else:
            assert torch.equal(after[name], tensor.to(dtype)), name


def test_a_bf16_base_stays_bf16(base, adapter, tmp_path):
    assert merge(base, adapter, tmp_path / "half", "--dtype", "bf16") == 0
    assert merge(tmp_path / "half", adapter, tmp_path / "again") == 0
    assert {info.dtype for info in open_weights(tmp_path / "again").tensors.values()} == {"bfloat16"}


def ckpt_adapter(path, weights, base=()):
    keep = Cast(None)
    with open(path, "wb") as file:
        writer = CkptWriter(file)
        for name, array in [
            *base,
            *((peft_to_mindformers(name, llama.FAMILY), array) for name, array in weights.items()),
        ]:
            writer.add(name, TensorInfo(array.shape, array.dtype.name), keep.pieces(name, array))
        writer.close()


def test_ckpt_in_and_out(base, adapter, tmp_path, capsys):
    """Base and adapter in one CKPT, as MindFormers' network.ckpt holds them; the alpha has to be given."""
    source = open_weights(base)
    tensors = [(llama.MINDFORMERS.write(name), source.read(name)) for name in source.tensors]
    ckpt_adapter(tmp_path / "network.ckpt", factors(), tensors)
    arguments = (tmp_path / "network.ckpt", tmp_path / "network.ckpt", tmp_path / "merged.ckpt", "--config", str(base))
    assert merge(*arguments) == 2
    assert "network.ckpt: does not say its alpha" in capsys.readouterr().err and not (tmp_path / "merged.ckpt").exists()
    assert merge(*arguments, "--lora_alpha", "6") == 0
    assert merge(base, adapter, tmp_path / "merged") == 0
    ours, theirs = open_weights(tmp_path / "merged.ckpt"), open_weights(tmp_path / "merged")
    assert ours.tensors == theirs.tensors
    assert all(ours.read(name).tobytes() == theirs.read(name).tobytes() for name in ours.tensors)


def test_a_ckpt_base_with_joined_tensors(base, adapter, tmp_path):
    write_ckpt(open_weights(base), SPEC, tmp_path / "base.ckpt", qkv_concat=True)
    assert merge(tmp_path / "base.ckpt", adapter, tmp_path / "a") == 0
    assert merge(base, adapter, tmp_path / "b") == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_an_adapter_of_another_model_is_refused(base, tmp_path, capsys):
    modules = ("model.layers.0.self_attn.q_proj", "model.layers.7.self_attn.q_proj")
    weights = {
        name: np.ones((4, 32) if "lora_A" in name else (40, 4), np.float32)
        for module in modules
        for name in peft_names(module)
    }
    write_adapter(tmp_path / "other", Lora(4, 8.0, 0.0, modules), weights, "elsewhere")
    before = sorted(os.listdir(tmp_path))
    assert merge(base, tmp_path / "other", tmp_path / "merged") == 2
    error = capsys.readouterr().err
    assert "model.layers.0.self_attn.q_proj: B A is [40, 32], but the base's weight is [32, 32]" in error
    assert "tunes 'model.layers.7.self_attn.q_proj', which the base model does not have" in error
    assert sorted(os.listdir(tmp_path)) == before


def test_what_is_no_adapter_is_said(base, tmp_path, capsys):
    assert merge(base, base, tmp_path / "merged") == 2
    assert "is no LoRA adapter (a PEFT folder with adapter_config.json" in capsys.readouterr().err
    assert merge(base, tmp_path / "nowhere", tmp_path / "merged") == 2
    assert "nowhere: does not exist" in capsys.readouterr().err


def test_an_adapter_given_as_model_is_said(adapter, tmp_path, capsys):
    assert merge(adapter, adapter, tmp_path / "merged") == 2
    assert "is a LoRA adapter, not a model" in capsys.readouterr().err
