"""Adapters against peft itself, both ways, and MindFormers' LoRA tensors in CKPT files."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch

from msft.backend.contract import Lora
from msft.convert import adapter
from msft.convert.adapter import adapter_lora, read_adapter, write_adapter
from msft.convert.ckpt import CkptWriter
from msft.convert.dtypes import Cast
from msft.convert.source import TensorInfo
from msft.errors import InputError
from msft.models import llama
from msft.models.adapters import peft_names, peft_to_mindformers
from msft.models.shapes import linear_modules, tensor_shapes

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def factors(spec, modules, rank=4, dtype=np.float32) -> dict[str, np.ndarray]:
    shapes, rng, result = tensor_shapes(spec), np.random.default_rng(3), {}
    for module in modules:
        rows, columns = shapes[f"{module}.weight"]
        first, second = peft_names(module)
        result[first] = rng.normal(size=(rank, columns)).astype(dtype)
        result[second] = rng.normal(size=(rows, rank)).astype(dtype)
    return result


def all_of(spec, *leaves):
    return tuple(module for module in linear_modules(spec) if module.rsplit(".", 1)[-1] in leaves)


CASES = {
    "attention": lambda spec: all_of(spec, "q_proj", "v_proj"),
    "everything": lambda spec: all_of(spec, *LINEARS),
    "one layer": lambda spec: ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
    "mixed": lambda spec: ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"),
}


@pytest.mark.parametrize("with_spec", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_exactly_our_modules(tmp_path, hf_folder, spec, case, with_spec):
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import LlamaForCausalLM

    modules = CASES[case](spec)
    lora, weights = Lora(4, 12.0, 0.05, modules), factors(spec, modules)
    write_adapter(tmp_path / "adapter", lora, weights, str(hf_folder), spec if with_spec else None)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(hf_folder), tmp_path / "adapter")
    state = get_peft_model_state_dict(loaded)
    assert set(state) == set(weights)
    for name, array in weights.items():
        assert np.array_equal(state[name].numpy(), array)
    layer = loaded.get_submodule(f"base_model.model.{modules[0]}")
    assert (layer.scaling["default"], layer.lora_dropout["default"].p) == (12.0 / 4, 0.05)
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    if with_spec and case == "attention":
        assert targets == ["q_proj", "v_proj"]
    again, arrays = read_adapter(tmp_path / "adapter")
    found = adapter_lora(again, arrays, "x")
    assert (found.rank, found.alpha, found.dropout, set(found.modules)) == (4, 12.0, 0.05, set(modules))


@pytest.mark.parametrize("safe", [True, False])
def test_we_read_what_peft_writes(tmp_path, hf_folder, safe):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import LlamaForCausalLM

    config = LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.1, target_modules=r".*\.1\..*(k_proj|up_proj)", task_type="CAUSAL_LM"
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(hf_folder), config)
    state = get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    if not safe:  # the layout of old versions of peft
        (tmp_path / "adapter_model.safetensors").unlink()
        torch.save(state, tmp_path / "adapter_model.bin")
    settings, weights = read_adapter(tmp_path)
    assert set(weights) == set(state)
    for name, tensor in state.items():
        assert np.array_equal(weights[name], tensor.detach().numpy())
    lora = adapter_lora(settings, weights, "x")
    assert (lora.rank, lora.alpha, lora.dropout) == (3, 5.0, 0.1)
    assert set(lora.modules) == {"model.layers.1.self_attn.k_proj", "model.layers.1.mlp.up_proj"}


def test_rslora_is_folded_into_alpha(spec):
    """rsLoRA scales by alpha / sqrt(rank): with rank 4 and alpha 8 that is 4 = alpha' / rank for alpha' = 16."""
    lora = adapter_lora({"lora_alpha": 8, "use_rslora": True}, factors(spec, CASES["mixed"](spec)), "x")
    assert lora.alpha / lora.rank == 8 / 4**0.5


def write_ckpt_adapter(path, spec, weights, base: dict[str, np.ndarray] = {}):  # noqa: B006
    keep = Cast(None)
    arrays = {peft_to_mindformers(name, llama.FAMILY): array for name, array in weights.items()}
    with open(path, "wb") as file:
        writer = CkptWriter(file)
        for name, array in {**base, **arrays, "global_step": np.array(3)}.items():
            writer.add(name, TensorInfo(array.shape, array.dtype.name), keep.pieces(name, array))
        writer.close()
    return arrays


def test_mindformers_adapters_in_a_ckpt(tmp_path, spec, expected, capsys):
    weights = factors(spec, CASES["mixed"](spec), dtype=np.float16)
    base = {llama.MINDFORMERS.write(name): array for name, array in expected.items()}
    arrays = write_ckpt_adapter(tmp_path / "network.ckpt", spec, weights, base)
    assert "model.layers.0.attention.wq.mindpet_delta_lora_a" in arrays
    assert "model.layers.1.attention.wv.mindpet_delta_lora_b" in arrays
    for path in (tmp_path / "network.ckpt", tmp_path):
        config, loaded = read_adapter(path)
        assert set(loaded) == set(weights) and all(np.array_equal(loaded[name], weights[name]) for name in weights)
    assert config["lora_alpha"] is None and config["target_modules"] == ["q_proj", "v_proj"]
    assert adapter_lora(config, loaded, "x", alpha=16.0).alpha == 16.0
    from msft.convert.open import open_weights

    assert set(open_weights(tmp_path / "network.ckpt").tensors) == set(expected)
    assert "left out 4 LoRA tensors" in capsys.readouterr().err


def test_a_ckpt_without_adapter_is_said(tmp_path, spec, expected):
    write_ckpt_adapter(tmp_path / "x.ckpt", spec, {}, {"model.norm_out.weight": expected["model.norm.weight"]})
    with pytest.raises(InputError, match="x.ckpt: holds no LoRA tensors"):
        read_adapter(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"r": 5}, "says rank 5, but the tensors have rank 4"),
        ({"lora_dropout": "high"}, "lora_dropout must be a number from 0 to below 1, not 'high'"),
        ({"lora_dropout": 4}, "lora_dropout must be a number from 0 to below 1, not 4"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number from 0 to below .*, not '8'"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a number from 0 to below .*, not inf"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, not 'false'"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path, spec, change, message):
    modules = CASES["attention"](spec)
    write_adapter(tmp_path / "adapter", Lora(4, 8.0, 0.0, modules), factors(spec, modules), "base")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=message) as error:
        read_adapter(tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(next(name for name in w if "lora_B" in name)), "lacks lora_B"),
        (
            lambda w: w.update({"base_model.model.lm_head.weight": np.zeros((2, 2))}),
            "'base_model.model.lm_head.weight'",
        ),
        (lambda w: w.update({peft_names("model.layers.0.self_attn.q_proj")[1]: np.zeros((32, 3))}), "different ranks"),
        (
            lambda w: w.update(
                {
                    name: np.zeros((2, 32)) if "lora_A" in name else np.zeros((32, 2))
                    for name in peft_names("model.layers.0.self_attn.q_proj")
                }
            ),
            r"different ranks \(\[2, 4\]\)",
        ),
        (lambda w: w.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_are_no_pairs_are_named(spec, change, message):
    weights = factors(spec, CASES["attention"](spec))
    change(weights)
    with pytest.raises(InputError, match=message):
        adapter_lora({}, weights, "here")


def test_writing_into_an_existing_folder_replaces_the_files(tmp_path, spec):
    """A training checkpoint puts the adapter beside its own files."""
    modules = CASES["mixed"](spec)
    (tmp_path / "other").write_text("kept")
    for dtype in (np.float32, ml_dtypes.bfloat16):
        weights = factors(spec, modules, dtype=dtype)
        write_adapter(tmp_path, Lora(4, 8.0, 0.0, modules), weights, "base")
        assert all(read_adapter(tmp_path)[1][name].tobytes() == weights[name].tobytes() for name in weights)
    assert sorted(file.name for file in tmp_path.iterdir()) == [adapter.CONFIG, adapter.WEIGHTS, "other"]


def test_a_failed_write_leaves_nothing(tmp_path, spec):
    modules = CASES["mixed"](spec)
    weights = factors(spec, modules)
    weights[peft_names(modules[0])[0]] = np.zeros((4, 32), dtype=object)
    with pytest.raises(KeyError):
        write_adapter(tmp_path / "adapter", Lora(4, 8.0, 0.0, modules), weights, "base")
    assert list(tmp_path.iterdir()) == []
