"""Protects: adapters that an engine would apply wrongly, or not at all, are refused before a framework is imported."""

import json

import numpy as np
import pytest

from msft.backend.contract import Lora
from msft.convert.adapter import write_adapter
from msft.errors import InputError
from msft.models.adapters import peft_names
from msft.predict.loading import end_ids, load_engine, load_spec


def adapter(folder, module, rows=32, columns=32):
    shapes = ((4, columns), (rows, 4))
    weights = {name: np.ones(shape, np.float32) for name, shape in zip(peft_names(module), shapes, strict=True)}
    write_adapter(folder, Lora(4, 8.0, 0.0, (module,)), weights, "base")
    return folder


@pytest.mark.parametrize(
    "module,sizes,message",
    [
        ("model.layers.7.self_attn.q_proj", {}, "'model.layers.7.self_attn.q_proj', which the model does not have"),
        ("lm_head", {"rows": 128}, "tunes lm_head, which works only when it is merged"),
        ("model.layers.0.self_attn.q_proj", {"rows": 48}, r"B A is \[48, 32\], but the model's weight is \[32, 32\]"),
    ],
)
def test_an_adapter_of_another_model_is_refused(tiny_model, tmp_path, module, sizes, message):
    with pytest.raises(InputError, match=message):
        load_engine(load_spec(tiny_model), tiny_model, adapter(tmp_path / "a", module, **sizes), "torch")


def test_a_checkpoint_that_does_not_say_its_alpha_is_refused(tiny_model, tmp_path):
    """Alpha unknown would be not-a-number in every logit."""
    import json

    folder = adapter(tmp_path / "a", "model.layers.0.self_attn.q_proj")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": None}))
    with pytest.raises(InputError, match="does not say its alpha; give --lora_alpha"):
        load_engine(load_spec(tiny_model), tiny_model, folder, "torch")


def test_alpha_without_an_adapter_is_refused(tiny_model):
    with pytest.raises(InputError, match="--lora_alpha: goes with --adapter"):
        load_engine(load_spec(tiny_model), tiny_model, None, "torch", lora_alpha=16.0)


def test_a_model_ends_where_its_config_and_its_generation_config_say(tiny_model, tmp_path):
    """Releases name the end of a turn in the one, the end of a text in the other."""
    spec = load_spec(tiny_model)
    assert end_ids(spec, None) == spec.eos_token_ids == end_ids(spec, tmp_path) == (2,)
    path = tmp_path / "generation_config.json"
    for given, found in ((7, (2, 7)), ([9, 7], (2, 7, 9)), (None, (2,))):
        path.write_text(json.dumps({"eos_token_id": given}))
        assert end_ids(spec, tmp_path) == end_ids(spec, str(tmp_path / "model.ckpt")) == found
    for given in ("7", [7, "x"], True, {"a": 1}):
        path.write_text(json.dumps({"eos_token_id": given}))
        with pytest.raises(InputError, match="generation_config.json: 'eos_token_id' must be a token's number or"):
            end_ids(spec, tmp_path)
