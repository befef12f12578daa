"""MindFormers-style CKPTs of a run: names, numbering, meta.json, what stays, and MindSpore's own reader as oracle."""

import json

import numpy as np
import pytest

from msft.backend.contract import EngineState
from msft.convert.adapter import read_adapter
from msft.convert.check import check_against
from msft.convert.open import open_weights, read_spec
from msft.convert.random_weights import RandomWeights
from msft.models import llama
from msft.models.adapters import peft_names
from msft.models.families import spec_from_hf
from msft.models.shapes import linear_modules, tensor_shapes
from msft.train import ckpt_export
from tests.conformance.families import CONFIGS

MODULE = "model.layers.1.self_attn.v_proj"


@pytest.fixture
def spec(tiny_model):
    return read_spec(tiny_model)


def state_of(weights):
    return EngineState(weights, {}, {}, {})


def write(folder, tiny_model, spec, position, weights):
    return ckpt_export.write(folder, "tiny", position, spec, open_weights(tiny_model, spec), state_of(weights))


def test_mindspore_reads_base_and_adapter(tmp_path, tiny_model, spec):
    mindspore = pytest.importorskip("mindspore")
    first, second = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((2, 32), (16, 2)))
    norm = np.full(32, 3.0, np.float32)
    names = peft_names(MODULE)
    path = write(tmp_path, tiny_model, spec, (2, 3), {names[0]: first, names[1]: second, "model.norm.weight": norm})
    assert path == tmp_path / "checkpoint" / "rank_0" / "tiny_rank_0-2_3.ckpt"
    found = {name: value.asnumpy() for name, value in mindspore.load_checkpoint(str(path), crc_check=True).items()}
    base = open_weights(tiny_model, spec)
    expected = {llama.MINDFORMERS.write(name): base.read(name) for name in tensor_shapes(spec)}
    expected["model.norm_out.weight"] = norm
    expected["model.layers.1.attention.wv.mindpet_delta_lora_a"] = first
    expected["model.layers.1.attention.wv.mindpet_delta_lora_b"] = second
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_newest_stay_and_meta_names_the_last(tmp_path, tiny_model, spec):
    folder = tmp_path / "checkpoint" / "rank_0"
    folder.mkdir(parents=True)
    # Not ours: another prefix, and a step that this run has not reached.
    for name in ("other_rank_0-1_1.ckpt", "tiny_rank_0-9_9.ckpt", "tiny_rank_0-network.ckpt"):
        (folder / name).write_text("")
    for position in ((1, 9), (1, 10), (2, 1)):
        write(tmp_path, tiny_model, spec, position, {})
        ckpt_export.prune(tmp_path, "tiny", 2, position)
    assert sorted(path.name for path in folder.iterdir()) == [
        "meta.json",
        "other_rank_0-1_1.ckpt",
        "tiny_rank_0-1_10.ckpt",
        "tiny_rank_0-2_1.ckpt",
        "tiny_rank_0-9_9.ckpt",
        "tiny_rank_0-network.ckpt",
    ]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta == {"last_epoch": 2, "last_step": 1, "last_ckpt_file": "tiny_rank_0-2_1.ckpt"}
    # The sizes are found without a recipe.
    assert read_spec(folder / "tiny_rank_0-2_1.ckpt") == spec


@pytest.mark.parametrize("name", ["qwen2_moe", "mamba"])
def test_adapters_of_a_family_without_mindformers_names_are_left_out_of_its_model(name, tmp_path):
    spec = spec_from_hf(CONFIGS[name])
    base, (module, *_) = RandomWeights(spec, 3), linear_modules(spec)
    outputs, inputs = tensor_shapes(spec)[f"{module}.weight"]
    first, second = peft_names(module)
    factors = {first: np.ones((2, inputs), np.float32), second: np.ones((outputs, 2), np.float32)}
    path = ckpt_export.write(tmp_path, "tiny", (1, 1), spec, base, state_of(factors))
    again = open_weights(path, spec)
    check_against(spec, again)
    assert all(np.array_equal(again.read(tensor), base.read(tensor)) for tensor in base.tensors)
    assert read_adapter(path, spec.family)[1].keys() == factors.keys()
