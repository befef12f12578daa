"""Weights must mean the same on both sides: what our converter writes is the model MindFormers runs."""

import json

import mindformers_recipe
import numpy as np
import pytest

from msft.convert import ckpt
from msft.convert.stored import StoredTensors
from msft.models.llama import MINDFORMERS

pytestmark = pytest.mark.mindformers


@pytest.fixture(scope="module")
def joined(msft, tiny, tmp_path_factory):
    """The tiny model's CKPT with --qkv_concat True."""
    path = tmp_path_factory.mktemp("joined") / "joined.ckpt"
    arguments = ("--input_path", tiny.hf, "--output_path", path, "--qkv_concat", "True")
    msft("convert_weight", "--model", "llama", *arguments)
    return path


@pytest.mark.parametrize("concat", [False, True])
def test_mindformers_computes_transformers_logits_from_our_ckpt(their_logits, tiny, joined, tmp_path, concat):
    file = joined if concat else tiny.ckpt
    changes = {"model.model_config.qkv_concat": concat}
    recipe = mindformers_recipe.write(tmp_path / "r.yaml", "finetune", tmp_path, file, tmp_path / "out", changes)
    theirs, real = their_logits(recipe, file), tiny.ids != 0
    np.testing.assert_allclose(theirs[real], tiny.logits[real], atol=1e-5)


@pytest.mark.parametrize("backend", ["mindspore", "torch"])
def test_our_engine_computes_the_same_from_the_ckpt(engine_logits, tiny, joined, backend):
    real = tiny.ids != 0
    for file in (tiny.ckpt, joined):
        np.testing.assert_allclose(engine_logits(backend, file)[real], tiny.logits[real], atol=1e-5)


def test_every_tensor_has_the_name_that_mindformers_converter_gives_it(oracle, tiny, tmp_path):
    names = list(tiny.state)
    (tmp_path / "names.json").write_text(json.dumps(names))
    oracle("converter.py", "names", tmp_path / "names.json", tmp_path / "out.json")
    assert [MINDFORMERS.write(name) for name in names] == json.loads((tmp_path / "out.json").read_text())


def test_joined_tensors_are_those_of_mindformers_converter(oracle, tiny, joined, tmp_path):
    oracle("converter.py", "concat", tiny.ckpt, tmp_path / "theirs.ckpt")
    ours, theirs = (StoredTensors(ckpt.read_index(file).tensors) for file in (joined, tmp_path / "theirs.ckpt"))
    assert ours.tensors == theirs.tensors
    for name in theirs.tensors:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))
