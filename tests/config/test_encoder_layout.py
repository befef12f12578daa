"""Protects that an encoder-decoder is not dealt to processes in ways that nobody has seen it train in."""

import json

import pytest
from recipe_texts import load

from msft.backend.mesh import Mesh
from msft.backend.seq2seq import check_whole
from msft.config import derive
from msft.config.layout import Layout, layout
from msft.errors import InputError, RunError
from msft.estimate.run import estimate
from msft.models.catalog import parameters
from tests.conformance.families import CONFIGS


def recipe_of(tmp_path, lines):
    (tmp_path / "t5").mkdir(exist_ok=True)
    (tmp_path / "t5" / "config.json").write_text(json.dumps(CONFIGS["t5, gated, with a head"]))
    return load(tmp_path, f"backend: torch\nuse_parallel: True\nmodel: {{pretrained: {tmp_path / 't5'}}}\n{lines}")


def of(tmp_path, lines):
    recipe = recipe_of(tmp_path, lines)
    return layout(recipe, derive.model_spec(recipe), 2)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("parallel_config: {model_parallel: 2}\n", "model_parallel: 2: the layers of t5 are not dealt"),
        ("parallel_config: {context_parallel: 2}\n", "context_parallel: 2: the layers of t5 are not dealt"),
        ("parallel_config: {pipeline_stage: 3, micro_batch_num: 3}\n", "pipeline_stage: 3: the layers of t5 are not"),
        ("strategy: fsdp\n", r"r.yaml:4: strategy: fsdp: weights of an encoder-decoder are not shared out yet; ddp"),
        ("strategy: deepspeed\n", "strategy: deepspeed: weights of an encoder-decoder are not shared out yet"),
    ],
)
def test_what_would_cut_it_is_refused(tmp_path, lines, problem):
    with pytest.raises(InputError, match=problem):
        of(tmp_path, lines)


def test_processes_share_batches(tmp_path):
    assert of(tmp_path, "parallel: {enable_parallel_optimizer: True}\n") == Layout(2)


@pytest.mark.parametrize("mesh", [Mesh(tensor=2), Mesh(pipeline=2), Mesh(context=2)])
def test_engines_refuse_it_too(mesh):
    check_whole(Mesh(data=2), is_sharded=False)
    with pytest.raises(RunError, match="an encoder-decoder is not dealt to several processes"):
        check_whole(mesh, is_sharded=False)
    with pytest.raises(RunError, match="an encoder-decoder is not dealt"):
        check_whole(Mesh(data=2), is_sharded=True)


def test_the_estimate_counts_both_stacks_and_advises_no_cut(tmp_path):
    """A token passes half of the blocks: a step of half as many FLOPs as its parameters would cost a decoder."""
    recipe = recipe_of(tmp_path, "")
    found = estimate(recipe, "ascend910b", 4)
    spec = derive.model_spec(recipe)
    assert found.sizes.parameters == parameters(spec) and found.sizes.tuned == parameters(spec)
    assert found.own.plan.layout.tensor == found.own.plan.layout.pipeline == 1
    with pytest.raises(InputError, match="strategy: fsdp: weights of an encoder-decoder"):
        estimate(recipe_of(tmp_path, "strategy: fsdp\n"), "a100", 4)
