"""Protects that MindSpore's own parallel compiler takes the program and its strategies, and cuts as slices.py does.

Nothing is run, and the compiler is told that it is on Ascend (semi_auto_program.py says how).
"""

import json
import os
import subprocess
import sys

import pytest

from msft.backend import slices
from msft.backend.mesh import Mesh
from msft.convert import strategy
from msft.models.shapes import tensor_shapes
from tests.conformance.tiny_engines import UNTIED, spec_of

WIDE = {**UNTIED, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}


def compiled(folder, tuning, rank=0, **plan):
    environment = {**os.environ, "MS_DEV_PRECOMPILE_ONLY": "1", "GLOG_v": "3"}
    program = [sys.executable, "-m", "tests.conformance.semi_auto_program"]
    words = [*program, json.dumps(plan), tuning, str(rank), str(folder)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_every_parameter_and_its_moments_are_cut_as_by_explicit_slices(tmp_path):
    found = compiled(tmp_path, "full", data=512, tensor=4)
    shapes = tensor_shapes(spec_of(WIDE))
    assert found["parameters"] == {
        name: [*slices.own_shape(name, shape, Mesh(tensor=4))] for name, shape in shapes.items()
    }
    assert all(found["moments"][f"adam_m.{name}"] == cut for name, cut in found["parameters"].items())
    # The file that MindSpore writes beside it says the same to what reads distributed checkpoints.
    written = strategy.read_strategy(tmp_path / "ckpt_strategy_rank_0.ckpt")
    assert (written.stages, written.ranks) == (1, 2048)
    for name, shape in shapes.items():
        counts = written.layouts[name][0].counts()
        assert [size // parts for size, parts in zip(shape, counts, strict=True)] == found["parameters"][name]


@pytest.mark.slow
def test_adapters_are_cut_as_their_modules(tmp_path):
    found = compiled(tmp_path, "lora", data=512, tensor=4, vocab_emb_dp=False)["parameters"]
    layer = "model.layers.0"
    assert found[f"{layer}.self_attn.q_proj.lora_A.weight"] == [4, 32]
    assert found[f"{layer}.self_attn.q_proj.lora_B.weight"] == [16, 4]
    assert found[f"{layer}.mlp.down_proj.lora_A.weight"] == [4, 12]
    assert found[f"{layer}.mlp.down_proj.lora_B.weight"] == [32, 4]
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == [24, 32]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "layer", "end"), [(0, 0, "model.embed_tokens.weight"), (1029, 1, "lm_head.weight")])
def test_a_stage_has_its_layers_and_its_end_alone(tmp_path, rank, layer, end):
    found = compiled(tmp_path, "full", rank, data=256, tensor=4, pipeline=2, micro_batches=2)["parameters"]
    assert {name.split(".")[2] for name in found if ".layers." in name} == {str(layer)}
    assert {name for name in found if ".layers." not in name} == {end} | ({"model.norm.weight"} if layer else set())
