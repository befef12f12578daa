"""Protects how a pipeline deals a model to stages: every tensor is somewhere, and counts once in all."""

from collections import Counter

import pytest

from msft.backend import slices, stages
from msft.backend.contract import Lora, Precision, Tuning
from msft.backend.mesh import Mesh
from msft.backend.names import EMBEDDING, HEAD, hidden_dtype
from msft.errors import RunError
from msft.models import llama
from msft.models.shapes import tensor_shapes

SIZES = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "attention_bias": True,
}


def spec_of(**changes):
    return llama.spec_from_hf({**SIZES, **changes})


def test_stages_have_as_many_layers_each_and_what_stands_before_and_behind():
    spec, meshes = spec_of(), [Mesh(rank=rank, pipeline=2) for rank in range(2)]
    assert [stages.layers(spec, mesh) for mesh in meshes] == [range(0, 2), range(2, 4)]
    names = ["model.layers.1.mlp.up_proj.weight", "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"]
    assert [stages.own([*names, EMBEDDING, "model.norm.weight", HEAD], spec, mesh) for mesh in meshes] == [
        (names[0], EMBEDDING),
        (names[1], "model.norm.weight", HEAD),
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_has_a_place_and_counts_once(tied):
    spec = spec_of(tie_word_embeddings=tied)
    shapes, held, counted = tensor_shapes(spec), Counter(), Counter()
    for rank in range(8):
        mesh = Mesh(tensor=2, rank=rank, pipeline=4)
        own = stages.own(shapes, spec, mesh)
        held.update(own)
        counted.update(name for name in own if slices.counts(name, mesh))
    cut = [name for name in shapes if slices.axis(name, Mesh(tensor=2)) is not None]
    assert held == Counter(dict.fromkeys(shapes, 2)) + Counter({EMBEDDING: 2 * tied})
    assert counted == Counter(dict.fromkeys(shapes, 1)) + Counter(cut)


def test_tuning_of_a_stage_is_what_it_has_of_the_whole():
    modules = tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 3))
    tuning = Tuning((EMBEDDING, "model.layers.3.input_layernorm.weight"), Lora(2, 4.0, 0.1, modules))
    first, middle, _, last = (stages.own_tuning(tuning, spec_of(), Mesh(rank=rank, pipeline=4)) for rank in range(4))
    assert first == Tuning((EMBEDDING,), Lora(2, 4.0, 0.1, modules[:1]))
    assert middle == Tuning((), None)
    assert last == Tuning(("model.layers.3.input_layernorm.weight",), Lora(2, 4.0, 0.1, modules[1:]))
    shapes = stages.tuned_shapes(spec_of(), tuning)
    assert list(shapes.values()) == [(96, 32), (32,), (2, 32), (32, 2), (2, 32), (32, 2)]
    assert list(shapes)[3] == "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def test_layers_that_cannot_be_dealt_are_refused():
    with pytest.raises(RunError, match=r"pipeline_stage 3 does not divide num_hidden_layers \(4\)"):
        stages.check(spec_of(), Mesh(pipeline=3))


@pytest.mark.parametrize(
    ("parameters", "compute", "tuned", "expected"),
    [
        ("float32", "float32", False, "float32"),
        ("bfloat16", "bfloat16", False, "bfloat16"),
        ("bfloat16", "bfloat16", True, "float32"),
        ("float32", "bfloat16", False, "float32"),
        ("float16", "float32", False, "float32"),
        ("float16", "bfloat16", False, "float32"),
    ],
)
def test_hidden_states_have_the_dtype_of_what_they_are_the_sum_of(parameters, compute, tuned, expected):
    assert hidden_dtype(tuned, Precision(parameters=parameters, compute=compute)) == expected
