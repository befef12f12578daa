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
        (4, "parallel_config: {data_parallel: 2, model_parallel: 2, pipeline_stage: 1}\n", Layout(2, 2)),
        (4, "parallel_config: {model_parallel: 2, use_seq_parallel: True}\n", Layout(2, 2, sequence=True)),
        (4, "parallel_config: {model_parallel: 4, vocab_emb_dp: False}\n", Layout(1, 4, vocabulary=True)),
        (2, "parallel_config: {use_seq_parallel: True, vocab_emb_dp: False}\n", Layout(2, 1)),
    ],
)
def test_layouts(workers, lines, expected, tmp_path):
    assert of(tmp_path, workers, lines) == expected


def test_all_problems_at_once_with_line_and_what_works(tmp_path):
    lines = "use_parallel: True\nparallel_config:\n  data_parallel: 8\n  model_parallel: 3\n  pipeline_stage: 2\n"
    with pytest.raises(InputError) as caught:
        of(tmp_path, 4, lines)
    works = "; data_parallel 1, model_parallel 4 works for 4"
    first = len(SIZES.splitlines()) + 3
    assert [problem.split("r.yaml:")[-1] for problem in caught.value.problems] == [
        f"{first + 2}: parallel_config.pipeline_stage: 2: a model is not cut into stages here, only its matrices are"
        + works,
        f"{first + 1}: parallel_config.model_parallel: 3 does not divide num_attention_heads (4), "
        f"num_key_value_heads (4), intermediate_size (256){works}",
        f"{first}: parallel_config.data_parallel: 8 x model_parallel 3 x pipeline_stage 2 are 48 processes, but 4 "
        f"processes are started{works}",
    ]


def test_processes_that_are_too_few(tmp_path):
    lines = "use_parallel: True\nparallel_config: {model_parallel: 2}\n"
    with pytest.raises(InputError, match="needs 2 processes or a multiple of them, but one process was started"):
        of(tmp_path, 1, lines)
    with pytest.raises(InputError, match="data_parallel 3, model_parallel 1 works for 3"):
        of(tmp_path, 3, lines)


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
