"""Protects how a model is cut over ranks: which tensors along which axis, and that slices are the whole together."""

import numpy as np
import pytest

from msft.backend import slices
from msft.backend.mesh import Mesh

BLOCK = "model.layers.0."
ADAPTER = "base_model.model.model.layers.0."


@pytest.mark.parametrize(
    ("name", "axis", "partial"),
    [
        (BLOCK + "self_attn.q_proj.weight", 0, False),
        (BLOCK + "self_attn.q_proj.bias", 0, False),
        (BLOCK + "self_attn.o_proj.weight", 1, False),
        (BLOCK + "self_attn.o_proj.bias", None, True),
        (BLOCK + "mlp.up_proj.weight", 0, False),
        (BLOCK + "mlp.down_proj.weight", 1, False),
        (BLOCK + "input_layernorm.weight", None, False),
        ("model.norm.weight", None, False),
        ("model.embed_tokens.weight", None, False),
        ("lm_head.weight", None, False),
        (ADAPTER + "self_attn.k_proj.lora_A.weight", None, True),
        (ADAPTER + "self_attn.k_proj.lora_B.weight", 0, False),
        (ADAPTER + "mlp.down_proj.lora_A.weight", 1, False),
        (ADAPTER + "mlp.down_proj.lora_B.weight", None, True),
    ],
)
def test_axes(name, axis, partial):
    assert slices.axis(name) == axis
    assert slices.is_partial(name) == partial


@pytest.mark.parametrize("axis", [0, 1])
def test_slices_are_the_whole_together(axis):
    whole = np.arange(48, dtype=np.float32).reshape(8, 6)
    meshes = [Mesh(tensor=2, rank=rank) for rank in range(2)]
    parts = [slices.cut(whole, axis, mesh) for mesh in meshes]
    np.testing.assert_array_equal(np.concatenate(parts, axis), whole)
    placed = [slices.placed(part, axis, mesh) for part, mesh in zip(parts, meshes, strict=True)]
    np.testing.assert_array_equal(sum(placed), whole)
    assert slices.cut(whole, None, meshes[1]) is whole
