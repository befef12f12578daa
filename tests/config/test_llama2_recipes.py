"""The recipes under configs/llama2: they load, have Llama 2's sizes, and say truly which keys do nothing."""

import math
import re
from pathlib import Path

import pytest
import yaml

from msft.backend import stages
from msft.backend.mesh import Mesh
from msft.config import derive
from msft.config.checks import check_device
from msft.config.layout import Layout, layout
from msft.config.load import load_recipe
from msft.config.yaml_lines import dotted, read_yaml
from msft.models.shapes import tensor_shapes

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "llama2"
FILES = sorted(FOLDER.glob("*.yaml"))
PARAMETERS = {"7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192}


def test_all_six_are_there():
    assert [path.stem for path in FILES] == [
        f"{kind}_llama2_{size}" for kind in ("finetune", "lora") for size in ("13b", "70b", "7b")
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sizes_and_what_is_trained(path):
    recipe = load_recipe(path)
    spec = derive.model_spec(recipe)
    shapes = tensor_shapes(spec)
    assert sum(math.prod(shape) for shape in shapes.values()) == PARAMETERS[path.stem.rsplit("_", 1)[1]]
    tuning = derive.tuning(recipe, spec)
    if path.stem.startswith("lora"):
        per_layer = 2 if "13b" in path.stem else 4
        assert tuning.parameters == () and len(tuning.lora.modules) == per_layer * spec.num_hidden_layers
    else:
        assert tuning.parameters == tuple(shapes) and tuning.lora is None
    assert derive.device(recipe) == "npu"
    check_device(recipe, "npu")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_commented_and_the_marks_are_true(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if re.match(r"\s*(- )?\w+: \S", line) and not re.search(r": &\w+$", line):
            assert " # " in line or "# " in lines[number - 2], f"{path.name}:{number}: no comment"
    recipe = load_recipe(path)
    marked = {number for number, line in enumerate(lines, 1) if "[MindFormers]" in line and not line.startswith("#")}
    ignored = {entry.place.order for entry in recipe.ignored}
    outvoted = {"train_dataset.batch_size"}
    blocks = {"metric", "eval_callbacks", "callbacks.2"}
    assert {e.place.order for e in recipe.ignored if e.path not in outvoted | blocks} <= marked
    heads = tuple(f"{entry.path}." for entry in recipe.ignored)
    inside = {place.order for keys, place in read_yaml(path).values.items() if dotted(keys).startswith(heads)}
    assert marked - ignored <= inside


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_plain_yaml_reader_sees_our_own_keys_only_where_they_are_marked(path):
    """MindFormers reads with yaml.safe_load; `[msft]` marks the keys that are not its own."""
    text = path.read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    assert data["optimizer"]["eps"] == 1e-8 and isinstance(data["lr_schedule"]["learning_rate"], float)
    assert data["train_dataset_task"]["dataset_config"] is data["train_dataset"]
    ours = [re.match(r"\s*(\w+):", line)[1] for line in text.splitlines() if re.search(r"# \[msft\]", line)]
    data = ["padding", "bucket_size", "packing", "length_grouping"]
    assert ours == ["backend", "max_skipped_steps", *data, "hang_timeout"]


@pytest.mark.parametrize("devices", [8, 16, 32, 64])
@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem != "finetune_llama2_70b"], ids=lambda path: path.stem
)
def test_layouts_for_8_to_64_devices(path, devices):
    """As the recipe stands for its own number of devices, with another data_parallel for others.

    70B is cut over 8, with its tokens and its vocabulary.
    """
    own = 64 if "70b" in path.stem else 8
    tensor = 8 if "70b" in path.stem else 1
    data = devices // tensor
    recipe = load_recipe(path, [] if devices == own else ["--parallel_config.data_parallel", str(data)])
    assert layout(recipe, derive.model_spec(recipe), devices) == Layout(
        data, tensor, sequence=tensor > 1, vocabulary=tensor > 1
    )


@pytest.mark.parametrize("devices", [32, 64, 128])
def test_full_tuning_of_70b_is_a_pipeline(devices):
    data = devices // 32
    flags = [] if devices == 64 else ["--parallel_config.data_parallel", str(data)]
    recipe = load_recipe(FOLDER / "finetune_llama2_70b.yaml", flags)
    spec = derive.model_spec(recipe)
    found = layout(recipe, spec, devices)
    assert (found.data, found.tensor, found.pipeline) == (data, 4, 8)
    assert derive.gradient_accumulation(recipe, 8) == 128
    for rank in (0, 4 * data, devices - 1):
        mesh = Mesh(data, 4, rank, pipeline=8)
        assert stages.layers(spec, mesh) == range(10 * mesh.stage, 10 * mesh.stage + 10)
