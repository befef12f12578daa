"""Protects what is read of Mamba's and Mamba2's configs, what takes adapters there, what is decayed, fresh weights."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from msft.backend.names import is_norm_or_bias
from msft.convert.random_weights import RandomWeights
from msft.errors import InputError
from msft.models.families import spec_from_hf
from msft.models.shapes import tensor_shapes
from msft.models.targets import lora_modules
from tests.conformance.families import CONFIGS, HEADS, STATES

MAMBA = {"model_type": "mamba", **STATES}
MAMBA2 = {"model_type": "mamba2", **STATES, **HEADS}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**MAMBA, "hidden_act": "gelu"}, "'hidden_act' is 'gelu'; only 'silu' is supported"),
        ({**MAMBA, "state_size": 0}, "'state_size' must be a whole number above 0, not 0"),
        ({**MAMBA, "time_step_rank": "half"}, "'time_step_rank' must be a whole number above 0, not 'half'"),
        ({**MAMBA, "intermediate_size": 48}, "'intermediate_size' is 48, but expand x hidden_size is 64"),
        ({**MAMBA, "use_bcdt_rms": True}, "'use_bcdt_rms' is True; only False is supported"),
        ({**MAMBA2, "rms_norm": False}, "'rms_norm' is False; only True is supported"),
        ({**MAMBA2, "num_heads": 7}, r"num_heads x head_dim \(7 x 8\) is not expand x hidden_size \(64\)"),
        ({**MAMBA2, "n_groups": 3}, r"num_heads \(8\) is no multiple of n_groups \(3\)"),
        ({**MAMBA2, "time_step_limit": [2, 1]}, "'time_step_limit' must be two numbers, least and largest, not"),
        ({**MAMBA2, "time_step_limit": 3}, "'time_step_limit' must be two numbers"),
    ],
)
def test_what_is_not_built_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        spec_from_hf(config)


def test_an_infinite_time_step_as_transformers_4_and_5_write_it():
    for infinite in (math.inf, {"__float__": "Infinity"}):
        spec = spec_from_hf({**MAMBA2, "time_step_limit": [0.0, infinite]})
        assert spec.state_space.time_step_limit == (0.0, math.inf)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba2, no biases"])
def test_shapes_are_transformers_and_there_is_no_attention(name):
    spec = spec_from_hf(CONFIGS[name])
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[name]))
    assert tensor_shapes(spec) == {key: tuple(part.shape) for key, part in theirs.named_parameters()}
    assert spec.num_attention_heads == spec.num_key_value_heads == spec.head_dim == spec.rotary_dim == 0


def test_modules_without_adapters_say_why():
    spec = spec_from_hf(MAMBA)
    assert {path.rpartition(".")[2] for path in lora_modules(None, spec)} == {"in_proj", "x_proj"}
    assert {path.rpartition(".")[2] for path in lora_modules(".*", spec)} == {"in_proj", "x_proj"}
    with pytest.raises(InputError, match="target_modules: 'out_proj': PEFT refuses adapters on the out_proj of Mamba"):
        lora_modules(["in_proj", "out_proj"], spec)
    with pytest.raises(InputError, match="'dt_proj': transformers reads dt_proj's weight past an adapter"):
        lora_modules("dt_proj", spec)
    with pytest.raises(InputError, match="'q_proj' matches no module.*there are in_proj, x_proj"):
        lora_modules("q_proj", spec)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_matrices_alone_are_decayed(name):
    """As the authors' code marks its tensors (`_no_weight_decay` for A_log, D, dt_bias), and norms and biases never."""
    spec = spec_from_hf(CONFIGS[name])
    decayed = {
        key.split(".", 3)[-1] if ".layers." in key else key for key in tensor_shapes(spec) if not is_norm_or_bias(key)
    }
    modules = {"in_proj", "out_proj", "conv1d"} | ({"x_proj", "dt_proj"} if name == "mamba" else set())
    assert decayed == {f"mixer.{module}.weight" for module in modules} | {"backbone.embeddings.weight"}


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_fresh_weights_are_drawn_as_transformers_does(name):
    """Decays and what passes are equal; time steps and matrices lie within the same bounds."""
    config = {**CONFIGS[name], "hidden_size": 64, **({"num_heads": 16} if name == "mamba2" else {})}
    spec, own = spec_from_hf(config), "backbone.layers.0.mixer."
    weights = RandomWeights(spec, 0)
    torch.manual_seed(0)
    theirs = dict(AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).named_parameters())
    for leaf in ("A_log", "D"):
        np.testing.assert_allclose(weights.read(own + leaf), theirs[own + leaf].detach().numpy(), rtol=1e-6)
    _, steps, _ = spec.state_space.scanned
    for leaf in (steps.removeprefix("mixer."), "conv1d.weight", "out_proj.weight"):
        drawn, expected = weights.read(own + leaf), theirs[own + leaf].detach().numpy()
        assert np.abs(drawn).max() == pytest.approx(np.abs(expected).max(), rel=0.25), leaf
        assert drawn.std() == pytest.approx(expected.std(), rel=0.35), leaf
    step = np.log1p(np.exp(weights.read(f"backbone.layers.0.{steps}")))
    assert step.min() >= 0.0009 and step.max() <= 0.11
