"""Protects the recipes that `msft recipe` writes: of every family and size they load, and mean what they say."""

import json
import re

import pytest
import yaml

from msft.backend import stages
from msft.cli.main import main
from msft.config import derive
from msft.config.checks import check_device
from msft.config.layout import Layout, layout
from msft.config.load import load_recipe
from msft.estimate.run import estimate
from msft.models.catalog import parameters
from msft.models.families import FAMILIES
from msft.models.shapes import tensor_shapes
from msft.models.sizes import SIZES, config_of
from msft.recipes.write import METHODS, recipe

ALL = [(family, size) for family, sizes in SIZES.items() for size in sizes]


def written(folder, family, size, method, devices=1):
    """A recipe beside a model folder that holds the published config.json alone."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(config_of(family, SIZES[family][size])))
    path = folder / f"{method}.yaml"
    path.write_text(recipe(family, size, method, str(model), str(path), devices))
    return path


@pytest.mark.parametrize(("family", "size"), ALL)
def test_every_recipe_loads_and_tunes_what_it_says(tmp_path, family, size):
    for method in METHODS:
        loaded = load_recipe(written(tmp_path, family, size, method))
        assert not loaded.ignored
        spec = derive.model_spec(loaded)
        tuning = derive.tuning(loaded, spec)
        if method == "full":
            assert tuning.parameters == tuple(tensor_shapes(spec)) and tuning.lora is None
        else:
            leaves = {module.rpartition(".")[2] for module in tuning.lora.modules}
            assert leaves == set(FAMILIES[family].lora_targets) and tuning.parameters == ()
            assert len(tuning.lora.modules) % spec.num_hidden_layers == 0
        assert derive.micro_batch_size(loaded) * derive.gradient_accumulation(loaded) == 16
        assert derive.seq_length(loaded) <= spec.max_position_embeddings
        assert derive.learning_rate(loaded) == {"lora": 1e-4, "full": 1e-5}[method]
        assert derive.optimizer(loaded).bias_correction and derive.max_grad_norm(loaded) == 1.0
        assert derive.recompute(loaded) == (parameters(spec) >= 3e9)
        for device in ("npu", "cpu"):
            check_device(loaded, device)
        assert not re.search(r"\$\w", (tmp_path / f"{method}.yaml").read_text())


@pytest.mark.parametrize(("family", "size"), [(family, next(iter(sizes))) for family, sizes in SIZES.items()])
def test_the_estimate_takes_every_familys_recipe(tmp_path, family, size):
    loaded = load_recipe(written(tmp_path, family, size, "lora", 8))
    spec = derive.model_spec(loaded)
    found = estimate(loaded, "ascend910b")
    assert found.asked.layout.data == 8 and found.sizes.parameters - found.sizes.adapters == parameters(spec)


def test_several_devices_share_batches(tmp_path):
    loaded = load_recipe(written(tmp_path, "qwen3", "4b", "full", 8))
    spec = derive.model_spec(loaded)
    assert layout(loaded, spec, 8) == Layout(8)
    assert loaded.use_parallel and derive.runtime(loaded, "npu", True).shard_optimizer
    assert stages.tuned_shapes(spec, derive.tuning(loaded, spec)) == tensor_shapes(spec)


def test_every_key_is_commented_but_what_explains_itself():
    plain = {"run_mode", "pet_type", "type", "max_grad_norm"}
    for line in recipe("llama", "llama2-7b", "lora").splitlines():
        key = re.match(r"\s*(?:- )?(\w+): \S", line)
        assert not key or key[1] in plain or " # " in line, line


def test_a_plain_yaml_reader_sees_the_same_values():
    data = yaml.safe_load(recipe("gemma2", "9b", "lora", "models/gemma"))
    assert data["lr_schedule"]["learning_rate"] == 1e-4 and data["model"]["pretrained"] == "models/gemma"
    assert data["model"]["pet_config"]["target_modules"] == ".*q_proj$|.*k_proj$|.*v_proj$|.*o_proj$"


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_trains(tmp_path, tiny_model, tiny_data, method):
    """With a model's own folder in the release's place, on the data of the flag; the other engine takes it too."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe("llama", "smollm2-135m", method, str(tiny_model), str(path)))
    words = ["train", str(path), "--train_dataset_dir", str(tiny_data[0]), "--output_dir", str(tmp_path / "out")]
    words += ["--device", "cpu", "--model.seq_length", "24", "--epochs", "1"]
    assert main([*words, "--backend", "mindspore", "--dry_run"]) == 0
    assert main([*words, "--backend", "torch"]) == 0
    losses = [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()]
    assert any("loss" in record for record in losses)
    assert (tmp_path / "out" / {"lora": "adapter", "full": "model"}[method]).is_dir()
