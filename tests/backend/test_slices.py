"""Protects how a model is cut over ranks: which tensors along which axis, and that slices are the whole together."""

import numpy as np
import pytest

from msft.backend import slices
from msft.backend.contract import Lora
from msft.backend.mesh import Mesh
from msft.models.llama import spec_from_hf
from tests.conformance.tiny_engines import TIED

BLOCK = "model.layers.0."
ADAPTER = "base_model.model.model.layers.0."


# What each layout does to a tensor: the axis it is cut along, or whether its gradient is a share: of a model that is
# whole, cut, cut with its tokens, with its vocabulary, with both.
MESHES = [
    Mesh(data=2, sequence=True, vocabulary=True),
    Mesh(tensor=2),
    Mesh(tensor=2, sequence=True),
    Mesh(tensor=2, vocabulary=True),
    Mesh(tensor=2, sequence=True, vocabulary=True),
]
BY_OUTPUTS, BY_INPUTS = [0] * 5, [1] * 5
SHARE = ["share"] * 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (BLOCK + "self_attn.q_proj.weight", BY_OUTPUTS),
        (BLOCK + "self_attn.q_proj.bias", BY_OUTPUTS),
        (BLOCK + "self_attn.o_proj.weight", BY_INPUTS),
        (BLOCK + "self_attn.o_proj.bias", SHARE),
        (BLOCK + "mlp.up_proj.weight", BY_OUTPUTS),
        (BLOCK + "mlp.down_proj.weight", BY_INPUTS),
        (BLOCK + "input_layernorm.weight", ["whole", "whole", "share", "whole", "share"]),
        ("model.norm.weight", ["whole", "whole", "share", "whole", "share"]),
        ("model.embed_tokens.weight", ["whole", "whole", "share", 0, 0]),
        ("lm_head.weight", ["whole", "share", "share", 0, 0]),
        (ADAPTER + "self_attn.k_proj.lora_A.weight", SHARE),
        (ADAPTER + "self_attn.k_proj.lora_B.weight", BY_OUTPUTS),
        (ADAPTER + "mlp.down_proj.lora_A.weight", BY_INPUTS),
        (ADAPTER + "mlp.down_proj.lora_B.weight", SHARE),
    ],
)
def test_axes_and_shares(name, expected):
    for mesh, said in zip(MESHES, expected, strict=True):
        assert slices.axis(name, mesh) == (said if isinstance(said, int) else None)
        assert slices.is_partial(name, mesh) == (said == "share")


def test_adapters_and_dropout_start_as_in_one_process():
    lora = Lora(4, 8.0, 0.1, ())
    for module, by_inputs in (("model.layers.0.self_attn.q_proj", False), ("model.layers.0.mlp.down_proj", True)):
        first, keys = slices.adapter_start(module, 12, lora, 5, Mesh())
        found = [
            slices.adapter_start(module, 6 if by_inputs else 12, lora, 5, Mesh(tensor=2, rank=rank)) for rank in (0, 1)
        ]
        if by_inputs:
            np.testing.assert_array_equal(np.concatenate([a for a, _ in found], 1), first)
            np.testing.assert_array_equal(np.concatenate([b for _, b in found]), keys)
        else:
            for own, own_keys in found:
                np.testing.assert_array_equal(own, first)
                np.testing.assert_array_equal(own_keys, keys)


def test_what_is_not_divided_is_named_with_its_size():
    spec = spec_from_hf(TIED)
    assert slices.undivided(spec, 2, True) == []
    assert slices.undivided(spec, 5, False) == [
        "num_attention_heads (4)",
        "num_key_value_heads (2)",
        "intermediate_size (48)",
    ]
    assert slices.undivided(spec, 5, True)[-1] == "vocab_size (96)"


def test_ranks_give_each_row_of_a_cut_vocabulary_once():
    shapes = {"lm_head.weight": (8, 3), "model.norm.weight": (3,)}
    seen = np.zeros((8, 3), int)
    for rank in range(4):
        places = slices.places(shapes, Mesh(data=2, tensor=2, rank=rank, vocabulary=True))
        places["lm_head.weight"].of(seen)[...] += 1
        assert ("model.norm.weight" in places) == (rank in (0, 2))
    assert (seen == 1).all()
    assert slices.whole_shape("lm_head.weight", (4, 3), Mesh(tensor=2, vocabulary=True)) == (8, 3)


@pytest.mark.parametrize("axis", [0, 1])
def test_slices_are_the_whole_together(axis):
    whole = np.arange(48, dtype=np.float32).reshape(8, 6)
    meshes = [Mesh(tensor=2, rank=rank) for rank in range(2)]
    parts = [slices.cut(whole, axis, mesh) for mesh in meshes]
    np.testing.assert_array_equal(np.concatenate(parts, axis), whole)
    placed = [slices.placed(part, axis, mesh) for part, mesh in zip(parts, meshes, strict=True)]
    np.testing.assert_array_equal(sum(placed), whole)
    assert slices.cut(whole, None, meshes[1]) is whole
