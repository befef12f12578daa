"""Which weights a recipe means: every kind of `load_checkpoint`, what is refused, what a new run may not use."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msft.backend import slices
from msft.backend.contract import Lora, StateParts
from msft.backend.mesh import Mesh
from msft.config.load import load_recipe
from msft.convert.adapter import write_adapter
from msft.convert.ckpt import CkptWriter
from msft.convert.dtypes import Cast
from msft.convert.open import open_weights, read_spec
from msft.convert.random_weights import RandomWeights
from msft.convert.source import TensorInfo
from msft.convert.weights import write_ckpt
from msft.errors import InputError
from msft.files import write_json
from msft.models import llama
from msft.models.adapters import peft_names, peft_to_mindformers
from msft.models.shapes import tensor_shapes
from msft.train import checkpoint, manifest, outputs, sliced, sources

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
LORA = Lora(2, 4.0, 0.0, MODULES)
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2, "vocab_size": 128, "multiple_of": 16}


@pytest.fixture
def spec(tiny_model):
    return read_spec(tiny_model)


@pytest.fixture
def factors(spec):
    shapes = tensor_shapes(spec)
    generator = np.random.default_rng(0)
    result = {}
    for module in MODULES:
        rows, columns = shapes[f"{module}.weight"]
        first, second = peft_names(module)
        result[first] = generator.normal(size=(2, columns)).astype(np.float32)
        result[second] = generator.normal(size=(rows, 2)).astype(np.float32)
    return result


def recipe_with(write_recipe, load_checkpoint, **changes):
    return load_recipe(write_recipe(**changes), ["--load_checkpoint", str(load_checkpoint)])


def write_tensors(path, arrays):
    with open(path, "wb") as file:
        writer, keep = CkptWriter(file), Cast(None)
        for name, array in arrays.items():
            writer.add(name, TensorInfo(array.shape, array.dtype.name), keep.pieces(name, array))
        writer.close()
    return path


def test_the_pretrained_folder_and_a_ckpt_in_its_place(write_recipe, tiny_model, spec, tmp_path):
    found = sources.open_all(load_recipe(write_recipe()), spec, None)
    assert found.path == tiny_model and found.adapter is None and found.describe() == str(tiny_model)
    other = RandomWeights(spec, 99)
    write_ckpt(other, spec, tmp_path / "other.ckpt")
    found = sources.open_all(recipe_with(write_recipe, tmp_path / "other.ckpt"), spec, None)
    assert found.path == tmp_path / "other.ckpt"
    name = "model.layers.1.mlp.up_proj.weight"
    assert np.array_equal(found.base.read(name), other.read(name))


def test_a_peft_folder_stands_on_the_pretrained_model(write_recipe, tiny_model, spec, factors, tmp_path):
    write_adapter(tmp_path / "adapter", LORA, factors, str(tiny_model), spec)
    found = sources.open_all(recipe_with(write_recipe, tmp_path / "adapter"), spec, None)
    assert (found.path, found.adapter_path) == (tiny_model, tmp_path / "adapter")
    assert found.adapter == LORA and found.factors.keys() == factors.keys()


def test_mindformers_ckpt_with_base_and_adapter_gives_both(write_recipe, spec, factors, tmp_path):
    base = RandomWeights(spec, 5)
    tensors = {llama.MINDFORMERS.write(name): base.read(name) for name in base.tensors}
    tensors |= {peft_to_mindformers(name, llama.FAMILY): array for name, array in factors.items()}
    path = write_tensors(tmp_path / "network.ckpt", tensors)
    found = sources.open_all(recipe_with(write_recipe, path), spec, None)
    assert found.path == found.adapter_path == path
    assert np.array_equal(found.base.read("lm_head.weight"), base.read("lm_head.weight"))
    assert all(np.array_equal(found.factors[name], factors[name]) for name in factors)
    assert np.isnan(found.adapter.alpha)
    sources.check_adapter(found, LORA, "recipe.yaml")
    with pytest.raises(InputError, match="does not say its alpha"):
        sources.with_alpha(found, None, "recipe.yaml")
    pet = load_recipe(write_recipe()).model.pet_config
    assert sources.with_alpha(found, pet, "recipe.yaml") == replace(found.adapter, alpha=8.0)


def test_mindformers_ckpt_with_an_adapter_alone_needs_a_base(write_recipe, spec, factors, tiny_model, tmp_path):
    tensors = {peft_to_mindformers(name, llama.FAMILY): array for name, array in factors.items()}
    path = write_tensors(tmp_path / "adapter.ckpt", tensors)
    assert sources.open_all(recipe_with(write_recipe, path), spec, None).path == tiny_model
    with pytest.raises(InputError, match="is an adapter without its base model"):
        sources.open_all(recipe_with(write_recipe, path, model={"model_config": SIZES}), spec, None)


def write_checkpoint_of_parts(folder, arrays):
    """A whole checkpoint of two processes, as far as weights are concerned."""
    for rank in range(2):
        places = slices.places({name: array.shape for name, array in arrays.items()}, Mesh(2, 1, rank))
        own = {name: place.of(arrays[name]) for name, place in places.items()}
        sliced.write(folder, rank, StateParts(own, own, own, places, {}))
    write_json(folder / checkpoint.STATE, {})
    manifest.write(folder, sliced.wait(folder, 2))
    return folder


@pytest.mark.parametrize("way", ["load_checkpoint", "both", "resume_training"])
def test_a_model_in_parts_is_a_base_of_its_own(way, write_recipe, tiny_model, spec, tmp_path):
    other = RandomWeights(spec, 7)
    folder = write_checkpoint_of_parts(tmp_path / "step-2", {name: other.read(name) for name in other.tensors})
    given = "" if way == "resume_training" else folder
    recipe = recipe_with(write_recipe, given, model={"model_config": SIZES})
    found = sources.open_all(recipe, spec, None if way == "load_checkpoint" else folder)
    assert found.path is None and found.describe() == str(folder)
    assert all(np.array_equal(found.base.read(name), other.read(name)) for name in other.tensors)


def test_tuned_tensors_in_parts_take_the_place_of_the_base_s(write_recipe, tiny_model, spec, factors, tmp_path):
    """An adapter and norms: without the norms it would be another model."""
    norm = np.full(32, 3, np.float32)
    folder = tmp_path / "step-2"
    write_adapter(folder, LORA, factors, str(tiny_model), spec)
    write_checkpoint_of_parts(folder, {"model.norm.weight": norm, **factors})
    found = sources.open_all(recipe_with(write_recipe, folder), spec, None)
    assert np.array_equal(found.base.read("model.norm.weight"), norm)
    name = "model.embed_tokens.weight"
    assert np.array_equal(found.base.read(name), open_weights(tiny_model).read(name))
    assert found.factors.keys() == factors.keys() and found.path is None
    with pytest.raises(InputError, match="step-2 has 1 tensors of the model alone: name the base weights"):
        sources.open_all(recipe_with(write_recipe, folder, model={"model_config": SIZES}), spec, None)


def test_a_model_in_parts_is_none_for_other_commands(spec, tmp_path):
    folder = write_checkpoint_of_parts(tmp_path / "step-2", {"model.norm.weight": np.ones(32, np.float32)})
    with pytest.raises(InputError, match="step-2: holds the parts of a job's processes, not a model: go on from it"):
        open_weights(folder, spec)


def test_weights_of_another_model_are_refused(write_recipe, spec, tmp_path):
    wrong = replace(spec, num_hidden_layers=1, intermediate_size=64)
    write_ckpt(RandomWeights(wrong, 0), wrong, tmp_path / "wrong.ckpt")
    with pytest.raises(InputError) as caught:
        sources.open_all(recipe_with(write_recipe, tmp_path / "wrong.ckpt"), spec, None)
    message = str(caught.value)
    assert "wrong.ckpt" in message and "is missing" in message and "the config says [48, 32]" in message


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 8}, "has rank 2, pet_config.lora_rank is 8"),
        ({"alpha": 2.0}, "alpha 4, pet_config.lora_alpha is 2"),
        ({"modules": MODULES[:1]}, "tune different modules"),
    ],
)
def test_an_adapter_must_fit_what_is_trained(spec, factors, change, message):
    given = sources.Weights(RandomWeights(spec, 0), None, LORA, factors, Path("a"))
    sources.check_adapter(given, LORA, "r.yaml")
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        sources.check_adapter(given, replace(LORA, **change), "r.yaml")


def test_results_are_moved_not_mixed(tmp_path):
    output = tmp_path / "out"
    for name in ("checkpoints/step-4/x", "checkpoints/step-8/x", "adapter/x", "trainer_log.jsonl", "msrun_log/x"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(name)
    assert outputs.is_result(output, output / "checkpoints" / "step-4")
    assert outputs.is_result(output, output / "adapter")
    assert not outputs.is_result(output, output / "msrun_log")
    assert not outputs.is_result(output, tmp_path / "adapter")
    outputs.set_aside_after(output, 4)
    assert (output / "checkpoints" / "step-4" / "x").is_file() and (output / "trainer_log.jsonl").is_file()
    earlier = output / "earlier" / "run-1"
    assert (earlier / "checkpoints" / "step-8" / "x").read_text() == "checkpoints/step-8/x"
    assert (earlier / "adapter" / "x").is_file()
    outputs.set_aside(output)
    assert (output / "earlier" / "run-2" / "trainer_log.jsonl").is_file()
    assert sorted(path.name for path in output.iterdir()) == ["earlier", "msrun_log"]


def test_the_overlay_of_tuned_weights(tiny_model, spec):
    from msft.train.weights import Overlay

    base = open_weights(tiny_model, spec)
    tuned = {"model.norm.weight": np.full(32, 3.0, np.float32)}
    both = Overlay(base, tuned)
    assert both.tensors.keys() == base.tensors.keys()
    assert np.array_equal(both.read("model.norm.weight"), tuned["model.norm.weight"])
    assert np.array_equal(both.read("lm_head.weight"), base.read("lm_head.weight"))
