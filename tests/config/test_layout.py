"""Protects which layouts of processes are taken, and that every problem is named with the nearest one that works."""

import pytest
from recipe_texts import SIZES, load

from msft.config import derive
from msft.config.layout import Layout, layout, nearest, without_effect
from msft.errors import InputError


def of(tmp_path, workers, lines="", *flags):
    recipe = load(tmp_path, f"{SIZES}{lines}", *flags)
    return layout(recipe, derive.model_spec(recipe), workers)


@pytest.mark.parametrize(
    ("workers", "lines", "expected"),
    [
        (1, "", Layout(1, 1)),
        (8, "", Layout(8, 1)),
        (1, "use_parallel: True\nparallel_config: {data_parallel: 8}\n", Layout(1, 1)),
        (1, "use_parallel: False\nparallel_config: {model_parallel: 2, pipeline_stage: 8}\n", Layout(1, 1)),
        (2, "parallel_config: {model_parallel: 2}\n", Layout(1, 2)),
        (4, "parallel_config: {model_parallel: 2}\n", Layout(2, 2)),
        (2, "parallel_config: {context_parallel: 2}\n", Layout(1, context=2)),
        (8, "parallel_config: {model_parallel: 2, context_parallel: 2}\n", Layout(2, 2, context=2)),
        (4, "parallel_config: {data_parallel: 2, model_parallel: 2, pipeline_stage: 1}\n", Layout(2, 2)),
        (4, "parallel_config: {pipeline_stage: 2, micro_batch_num: 2}\n", Layout(2, pipeline=2)),
        (8, "parallel_config: {model_parallel: 2, pipeline_stage: 2, micro_batch_num: 4}\n", Layout(2, 2, pipeline=2)),
        (4, "parallel_config: {model_parallel: 2, use_seq_parallel: True}\n", Layout(2, 2, sequence=True)),
        (4, "parallel_config: {model_parallel: 4, vocab_emb_dp: False}\n", Layout(1, 4, vocabulary=True)),
        (2, "parallel_config: {use_seq_parallel: True, vocab_emb_dp: False}\n", Layout(2, 1)),
    ],
)
def test_layouts(workers, lines, expected, tmp_path):
    assert of(tmp_path, workers, lines) == expected


def test_all_problems_at_once_with_line_and_what_works(tmp_path):
    lines = "use_parallel: True\nparallel_config:\n  data_parallel: 8\n  model_parallel: 3\n  pipeline_stage: 3\n"
    with pytest.raises(InputError) as caught:
        of(tmp_path, 4, lines)
    works = "; data_parallel 1, model_parallel 4, pipeline_stage 1 works for 4"
    first = len(SIZES.splitlines()) + 3
    assert [problem.split("r.yaml:")[-1] for problem in caught.value.problems] == [
        f"{first + 2}: parallel_config.pipeline_stage: 3 does not divide num_hidden_layers (2){works}",
        f" parallel_config.micro_batch_num: 1 micro-batches do not fill 3 stages: 3 would do{works}",
        f"{first + 1}: parallel_config.model_parallel: 3 does not divide num_attention_heads (4), "
        f"num_key_value_heads (4), intermediate_size (256){works}",
        f"{first}: parallel_config.data_parallel: 8 x model_parallel 3 x pipeline_stage 3 are 72 processes, but 4 "
        f"processes are started{works}",
    ]


def test_processes_that_are_too_few(tmp_path):
    lines = "use_parallel: True\nparallel_config: {model_parallel: 2}\n"
    with pytest.raises(InputError, match="needs 2 processes or a multiple of them, but one process was started"):
        of(tmp_path, 1, lines)
    with pytest.raises(InputError, match="data_parallel 3, model_parallel 1 works for 3"):
        of(tmp_path, 3, lines)


def test_parts_of_rows_count_and_the_nearest_layout_has_them(tmp_path):
    lines = "use_parallel: True\nparallel_config: {data_parallel: 2, model_parallel: 2, context_parallel: 4}\n"
    with pytest.raises(InputError) as caught:
        of(tmp_path, 8, lines)
    assert "2 x model_parallel 2 x context_parallel 4 are 16 processes, but 8 processes are started" in str(
        caught.value
    )
    assert "data_parallel 1, model_parallel 2, context_parallel 4 works for 8" in str(caught.value)
    with pytest.raises(InputError, match="context_parallel 3 needs 3 processes or a multiple of them, but 4"):
        of(tmp_path, 4, "parallel_config: {context_parallel: 3}\n")


def test_how_keys_and_values_reach_each_other_is_said_whatever_algorithm_is_named(tmp_path):
    recipe = load(tmp_path, f"{SIZES}parallel_config: {{context_parallel: 2, context_parallel_algo: ulysses_cp}}\n")
    (ignored,) = recipe.ignored
    assert (ignored.path, ignored.why[:29]) == (
        "parallel_config.context_parallel_algo",
        "keys and values are gathered ",
    )
    with pytest.raises(InputError, match="context_parallel_algo.*ring_cp"):
        load(tmp_path, f"{SIZES}parallel_config: {{context_parallel_algo: ring_cp}}\n")


def test_deepspeed_has_no_rows_that_processes_share(tmp_path):
    lines = "backend: torch\nstrategy: {}\nparallel_config: {{context_parallel: 2}}\n"
    with pytest.raises(InputError, match="strategy: deepspeed stands beside parallel_config.context_parallel 2"):
        load(tmp_path, SIZES + lines.format("deepspeed"))
    found = of(tmp_path, 4, lines.format("fsdp"))
    assert found == Layout(2, strategy="fsdp", context=2)
    assert str(found) == "each with its part of the model and its share of every batch (fsdp), its tokens dealt to 2"


def test_a_vocabulary_that_is_cut_has_to_divide(tmp_path):
    odd = SIZES.replace("vocab_size: 100", "vocab_size: 102")
    recipe = load(tmp_path, odd + "parallel_config:\n  model_parallel: 4\n  vocab_emb_dp: False\n")
    with pytest.raises(InputError) as caught:
        layout(recipe, derive.model_spec(recipe), 4)
    assert str(caught.value).endswith(
        "parallel_config.model_parallel: 4 does not divide vocab_size (102); "
        "data_parallel 2, model_parallel 2 works for 4"
    )
    whole = load(tmp_path, odd + "parallel_config: {model_parallel: 4}\n")
    assert layout(whole, derive.model_spec(whole), 4).tensor == 4


def test_what_nothing_is_cut_for_is_said(tmp_path):
    recipe = load(tmp_path, SIZES + "parallel_config: {use_seq_parallel: True, vocab_emb_dp: False}\n")
    assert without_effect(recipe, Layout(2, 1)) == [
        "parallel_config.use_seq_parallel: True has no effect: no model is cut (model_parallel 1)",
        "parallel_config.vocab_emb_dp: False has no effect: no model is cut (model_parallel 1)",
    ]
    assert without_effect(recipe, Layout(1, 2)) == []
    assert without_effect(load(tmp_path, SIZES), Layout(2, 1)) == []


def test_a_layout_is_said_in_words():
    assert str(Layout(2, 4)) == "2 shares of every batch, each for a model that is cut over 4"
    assert str(Layout(1, 2, sequence=True, vocabulary=True)).endswith("cut over 2, its tokens and its vocabulary too")


def test_the_nearest_layout_divides_processes_and_model(tmp_path):
    spec = derive.model_spec(load(tmp_path, SIZES))
    assert nearest(spec, 8, 2) == Layout(4, 2)
    assert nearest(spec, 8, 8) == Layout(2, 4)
    assert nearest(spec, 9, 3) == Layout(9, 1)
    assert nearest(spec, 8, 2, 3) == Layout(1, 2, context=4)
    assert nearest(spec, 8, 2, pipeline=2) == Layout(2, 2, pipeline=2)
    assert nearest(spec, 8, 4, pipeline=4) == Layout(1, 4, pipeline=2)


def test_micro_batches_count_in_a_pipeline_alone(tmp_path):
    lines = "parallel_config: {pipeline_stage: 2, micro_batch_num: 4}\n"
    lines += "runner_config: {gradient_accumulation_steps: 3}\n"
    recipe = load(tmp_path, SIZES + lines)
    assert (derive.gradient_accumulation(recipe), derive.gradient_accumulation(recipe, 2)) == (3, 12)
    assert not recipe.ignored
    recipe = load(tmp_path, SIZES + lines, "--parallel_config.pipeline_stage", "1")
    assert [entry.path for entry in recipe.ignored] == ["parallel_config.micro_batch_num"]
    assert "counts with pipeline_stage above 1" in recipe.ignored[0].why


def test_fsdp_shares_out_the_slices_of_a_model_that_is_cut(tmp_path):
    lines = "backend: torch\nstrategy: fsdp\nparallel_config: {model_parallel: 2, vocab_emb_dp: False}\n"
    found = of(tmp_path, 4, lines)
    assert found == Layout(2, 2, "fsdp", vocabulary=True)
    cut = "2 shares of every batch, each for a model that is cut over 2, its vocabulary too"
    assert str(found) == f"each with its part of the model (fsdp), {cut}"
    recipe, alone = load(tmp_path, SIZES + lines), of(tmp_path, 2, lines)
    assert alone == Layout(1, 2, vocabulary=True)
    assert without_effect(recipe, alone) == [
        "strategy: fsdp has no effect: no two processes have the same weights to share"
    ]
    assert without_effect(recipe, found) == []


def test_a_model_in_stages_and_a_strategy_are_one_of_two(tmp_path):
    flags = "--backend", "torch", "--strategy", "fsdp", "--parallel_config.pipeline_stage", "2"
    with pytest.raises(InputError, match="fsdp stands beside parallel_config.pipeline_stage 2: write one of the two"):
        load(tmp_path, SIZES, *flags)


def test_text_is_generated_by_a_whole_model(tmp_path):
    lines = "run_mode: predict\npredict_data: [w5]\nparallel_config: {context_parallel: 2}\n"
    assert of(tmp_path, 2, lines) == Layout(1, context=2)
    cut = "--parallel_config.model_parallel", "2", "--parallel_config.pipeline_stage", "2"
    with pytest.raises(InputError) as caught:
        of(tmp_path, 8, lines, *cut)
    assert [problem.split(": ", 1)[1] for problem in caught.value.problems] == [
        "parallel_config.model_parallel: 2: text is generated by a model that is whole: run_mode predict takes "
        "model_parallel 1",
        "parallel_config.pipeline_stage: 2: text is generated by a model that is whole: run_mode predict takes "
        "pipeline_stage 1",
    ]
    with pytest.raises(InputError, match="run it with strategy ddp"):
        of(tmp_path, 2, lines, "--backend", "torch", "--strategy", "fsdp")
    assert of(tmp_path, 1, lines, "--use_parallel", "False", *cut) == Layout()


def test_a_layout_that_one_process_leaves_out_is_told(tmp_path):
    lines = "use_parallel: False\nparallel_config: {model_parallel: 2, pipeline_stage: 2, micro_batch_num: 4}\n"
    recipe = load(tmp_path, SIZES + lines)
    assert without_effect(recipe, Layout()) == [
        "parallel_config: model_parallel 2, pipeline_stage 2, micro_batch_num 4: no effect, one process has the whole "
        "model and no stages"
    ]
    assert without_effect(recipe, Layout(1, 2, pipeline=2)) == []


def test_layouts_say_what_they_are():
    assert str(Layout(2, 2)) == "2 shares of every batch, each for a model that is cut over 2"
    assert str(Layout(2, pipeline=4)) == "2 shares of every batch, each for a model in 4 stages"
    assert str(Layout(1, 2, pipeline=4)) == "1 shares of every batch, each for a model in 4 stages, each cut over 2"
