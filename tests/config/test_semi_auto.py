"""Protects `parallel.parallel_mode: 1`: which recipes it takes, and that nothing of it is done in silence."""

from dataclasses import replace

import pytest
from recipe_texts import SIZES, load

from msft.backend.plan import Plan
from msft.config import derive, semi_auto
from msft.config.layout import Layout, layout
from msft.errors import InputError
from msft.models.spec import Block

ASKED = f"{SIZES}use_parallel: True\nparallel: {{parallel_mode: 1, enable_parallel_optimizer: True}}\n"
SHARES = "data_parallel: 2, model_parallel: 2, pipeline_stage: 2"
CUT = f"parallel_config: {{{SHARES}, micro_batch_num: 4, vocab_emb_dp: False}}\n"


def plan(tmp_path, workers, lines, *flags):
    recipe = load(tmp_path, f"{ASKED}{lines}", *flags)
    return semi_auto.plan(recipe, derive.model_spec(recipe), workers)


def ignored(recipe):
    return {entry.path: entry.why for entry in recipe.ignored}


@pytest.mark.parametrize(
    ("word", "mode"),
    [("0", 0), ("1", 1), ("semi_auto_parallel", 1), ("SEMI_AUTO", 1), ("data_parallel", 0), ("stand_alone", 0)],
)
def test_the_mode_is_a_number_or_mindspores_word(word, mode, tmp_path):
    assert load(tmp_path, SIZES, "--parallel.parallel_mode", word).parallel.parallel_mode == mode


@pytest.mark.parametrize("word", ["2", "auto_parallel", "True", "1.0"])
def test_other_modes_are_refused(word, tmp_path):
    with pytest.raises(InputError, match=r"must be 0 \(data_parallel, stand_alone\) or 1 \(semi_auto_parallel\)"):
        load(tmp_path, SIZES, "--parallel.parallel_mode", word)


def test_the_plan_is_parallel_configs(tmp_path):
    expected = Plan(2, 2, pipeline=2, micro_batches=8, vocab_emb_dp=False, shard_optimizer=True)
    assert plan(tmp_path, 8, CUT, "--runner_config.gradient_accumulation_steps", "2") == expected
    assert plan(tmp_path, 8, "parallel_config: {model_parallel: 4}\n") == Plan(2, 4, shard_optimizer=True)
    recipe = load(tmp_path, f"{ASKED}{CUT}")
    assert layout(recipe, derive.model_spec(recipe), 8) == Layout(2, 2, pipeline=2)


def test_all_problems_at_once(tmp_path):
    lines = "do_eval: True\ndevice: cpu\nparallel_config: {data_parallel: 2, model_parallel: 3, pipeline_stage: 4}\n"
    with pytest.raises(InputError) as caught:
        plan(tmp_path, 8, lines)
    problems = "\n".join(caught.value.problems)
    for said in (
        "parallel.parallel_mode: 1: MindSpore's semi-automatic mode exists on Ascend alone; parallel_mode 0 computes",
        "do_eval: parallel_mode 1 trains alone",
        "data_parallel: 2 x model_parallel 3 x context_parallel 1 x pipeline_stage 4 are 24 processes, but there are 8",
        "model_parallel: 3 parts do not divide num_attention_heads (4), num_key_value_heads (4), intermediate_size",
        "pipeline_stage: 4 parts do not divide num_hidden_layers (2)",
        "micro_batch_num: 1 micro-batches keep fewer than pipeline_stage 4 stages busy",
    ):
        assert said in problems
    assert len(caught.value.problems) == 6


def test_another_device_than_ascend_is_refused_when_it_is_known(tmp_path):
    recipe = load(tmp_path, ASKED)
    semi_auto.check_device(recipe, "npu", 8)
    with pytest.raises(InputError, match=r"parallel.parallel_mode 1: MindSpore's semi-automatic mode exists on Ascend"):
        semi_auto.check_device(recipe, "cpu", 8)


def test_torch_and_a_single_process_say_that_it_does_nothing(tmp_path):
    torch = load(tmp_path, ASKED, "--backend", "torch")
    assert "the same layout is computed by explicit slices" in ignored(torch)["parallel.parallel_mode"]
    one = load(tmp_path, ASKED, "--use_parallel", "False")
    assert "several processes" in ignored(one)["parallel.parallel_mode"]
    for recipe in (torch, one):
        assert not semi_auto.is_asked(recipe)
        assert layout(recipe, derive.model_spec(recipe), 1).tensor == 1
    assert "parallel.parallel_mode" not in ignored(load(tmp_path, ASKED))


def test_what_the_mode_reads_is_not_called_useless_and_what_it_overrides_is(tmp_path):
    found = ignored(load(tmp_path, f"{ASKED}{CUT}", "--train_dataset.padding", "bucket"))
    assert not [path for path in found if path.startswith("parallel_config.")]
    assert "one length" in found["train_dataset.padding"]


def test_the_dry_plan_is_yaml_of_what_mindspore_would_be_told(tmp_path):
    import yaml

    recipe = load(tmp_path, f"{ASKED}{CUT}")
    spec = derive.model_spec(recipe)
    lines = semi_auto.lines(semi_auto.plan(recipe, spec, 8), spec)
    assert "never run" in lines[0] and len(lines) < 30
    told = yaml.safe_load("\n".join(lines))
    assert told["set_auto_parallel_context"]["pipeline_stages"] == 2
    assert told["set_auto_parallel_context"]["gradients_mean"] is False
    assert told["shard"]["wo, w2"] == "((2, 2), (1, 2))"
    assert told["layers_of_stages"] == [1, 1] and told["micro_batches"] == 4


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({"norm_offset": 1.0, "family": "gemma"}, "gemma"),
        ({"windows": (8, 8)}, "llama"),
        ({"block": Block(head_norms=("self_attn.q_norm", "self_attn.k_norm"))}, "llama"),
    ],
)
def test_layers_that_its_program_does_not_compute_are_refused(changes, family, tmp_path):
    recipe = load(tmp_path, f"{ASKED}{CUT}")
    spec = replace(derive.model_spec(recipe), **changes)
    with pytest.raises(InputError, match=f"layers, without windows or normed heads, not {family}'s: take 0"):
        semi_auto.plan(recipe, spec, 8)
