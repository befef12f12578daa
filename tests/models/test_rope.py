"""Protects: rotary frequencies equal transformers' for every scaling kind."""

from dataclasses import replace

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from msft.errors import InputError
from msft.models import llama, rope
from msft.models.families import spec_from_hf

SIZES = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


LONG = {
    "rope_type": "longrope",
    "short_factor": [1 + index / 50 for index in range(32)],
    "long_factor": [1 + index / 3 for index in range(32)],
    "original_max_position_embeddings": 256,
}


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LONG,
        {**LONG, "factor": 2.0},
        {**LONG, "attention_factor": 1.3},
        {**LONG, "original_max_position_embeddings": 1024},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        LLAMA3,
        YARN,
        {**YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.2},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
    ],
)
@pytest.mark.parametrize("length", [100, 3000])
def test_frequencies_are_transformers(scaling, length):
    theta = 500000.0
    parameters = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    config = LlamaConfig(**{**SIZES, "rope_parameters": parameters})
    if scaling:
        expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=length)
    else:
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    spec = llama.spec_from_hf({**SIZES, "rope_theta": theta, "rope_scaling": scaling})
    inverse, ours = rope.frequencies(spec, length)
    np.testing.assert_allclose(inverse, expected.numpy(), rtol=1e-6)
    assert ours == pytest.approx(factor, rel=1e-9)
    assert inverse.dtype == np.float32


def test_tables_follow_the_position_ids():
    spec = llama.spec_from_hf({**SIZES, "rope_theta": 10000.0})
    cosine, sine = rope.tables(spec, np.array([[0, 3, 1]], np.int32))
    assert cosine.shape == (1, 3, 64)
    np.testing.assert_allclose(cosine[0, 0], 1)
    # The second frequency of 64 dimensions is 10000^(-2/64) = 0.749894; both halves hold the same angles.
    np.testing.assert_allclose(sine[0, 1, [1, 33]], np.sin(3 * 0.7498942), rtol=1e-5)


@pytest.mark.parametrize(
    "scaling,missing",
    [
        ({"rope_type": "linear"}, ["factor"]),
        ({"rope_type": "yarn", "factor": "4"}, ["factor"]),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, ["high_freq_factor", "original_max"]),
    ],
)
def test_absent_numbers_are_all_named(scaling, missing):
    spec = llama.spec_from_hf({**SIZES, "rope_scaling": scaling})
    with pytest.raises(InputError) as caught:
        rope.frequencies(spec, 10)
    assert len(caught.value.problems) == len(missing)
    assert all(word in problem for word, problem in zip(missing, caught.value.problems, strict=True))


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_phi3s_old_names_of_longrope_are_read_and_its_length_from_beside_them(kind):
    sizes = {**SIZES, "model_type": "phi3", "original_max_position_embeddings": 100}
    scaling = {"type": kind, "short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
    spec = spec_from_hf({**sizes, "rope_scaling": scaling})
    assert spec.rope_scaling["rope_type"] == "longrope" and rope.border(spec) == 100
    short, long = (rope.frequencies(spec, length) for length in (100, 101))
    np.testing.assert_allclose(short[0], 4 * long[0], rtol=1e-6)
    assert short[1] == long[1] == pytest.approx((1 + np.log(10.24) / np.log(100)) ** 0.5)
    assert rope.border(spec_from_hf(sizes)) is None
    del sizes["original_max_position_embeddings"]
    assert rope.border(spec_from_hf({**sizes, "rope_scaling": scaling})) == 4096


def test_longropes_factors_are_checked():
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 31, "long_factor": [1.0] * 31 + [0]}
    with pytest.raises(InputError) as caught:
        rope.check(llama.spec_from_hf({**SIZES, "rope_scaling": scaling}))
    assert [problem[:60] for problem in caught.value.problems] == [
        f"rope_scaling: longrope needs '{key}_factor' to be a list of 32"[:60] for key in ("short", "long")
    ]


def test_an_unknown_kind_is_named():
    spec = llama.spec_from_hf({**SIZES, "rope_scaling": {"rope_type": "lama3", "factor": 2.0}})
    with pytest.raises(InputError, match="did you mean 'llama3'"):
        rope.frequencies(spec, 10)


@pytest.mark.parametrize(
    "scaling,message",
    [
        (
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"},
            "'beta_fast' must be a number of 0 or more, not '32'",
        ),
        ({"rope_type": "linear", "factor": float("inf")}, "needs 'factor' to be a number above 0, not inf"),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}, "gives no frequencies"),
    ],
)
def test_numbers_that_give_no_frequencies_are_refused(scaling, message):
    with pytest.raises(InputError, match=message):
        rope.frequencies(llama.spec_from_hf({**SIZES, "rope_scaling": scaling}), 10)


@pytest.mark.parametrize(
    ("turned", "neighbours", "expected"),
    [
        (8, False, [(0, 4), (1, 5), (2, 6), (3, 7)]),
        (4, False, [(0, 2), (1, 3)]),
        (4, True, [(0, 1), (2, 3)]),
        (0, False, []),
    ],
)
def test_pairs_and_what_is_not_turned(turned, neighbours, expected):
    spec = replace(llama.spec_from_hf({**SIZES, "head_dim": 8}), rotary_dim=turned, neighbours=neighbours)
    assert rope.pairs(spec) == expected
    cosine, sine = rope.tables(spec, np.array([[5]], np.int32))
    assert (cosine[..., turned:] == 1).all() and (sine[..., turned:] == 0).all()
    for number, (first, second) in enumerate(expected):
        angle = 5 * 10000.0 ** (-2 * number / turned)
        assert cosine[0, 0, first] == cosine[0, 0, second] == pytest.approx(np.cos(angle), abs=1e-6)
        assert rope.signs(spec)[first] == -1 and rope.signs(spec)[second] == 1
