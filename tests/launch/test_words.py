"""The launcher script's words mean what they mean in MindFormers."""

from pathlib import Path

import pytest

from msft.errors import InputError
from msft.launch.layout import Layout
from msft.launch.words import parse

COMMAND = "run_finetune.py --config X.yaml"


def test_one_word_is_eight_workers_here():
    text, layout = parse([COMMAND])
    assert text == COMMAND
    assert layout == Layout(8, 8, "127.0.0.1", None, 0, Path("output/msrun_log"), True, 7200)


def test_two_words_are_that_many_workers_and_wait():
    assert parse([COMMAND, "2"])[1] == Layout(2, 2)


def test_a_port_from_outside_is_for_the_forms_that_have_no_word_for_it():
    assert [parse(words, "9119")[1].master_port for words in ([COMMAND], [COMMAND, "2"])] == [9119, 9119]
    assert parse([COMMAND, "4", "8119", "logs", "False", "300"], "9119")[1].master_port == 8119
    with pytest.raises(InputError, match="MASTER_PORT: 'nine' is not a number"):
        parse([COMMAND, "2"], "nine")


def test_six_words():
    layout = parse([COMMAND, "4", "8119", "logs", "False", "300"])[1]
    assert layout == Layout(4, 4, master_port=8119, log_dir=Path("logs"), wait=False, timeout=300)


def test_nine_words_are_several_machines():
    layout = parse([COMMAND, "8", "4", "10.0.0.7", "8118", "1", "logs", "True", "600"])[1]
    assert layout == Layout(8, 4, "10.0.0.7", 8118, 1, Path("logs"), True, 600)
    assert layout.nodes == 2 and list(layout.ranks) == [4, 5, 6, 7]
    names = [path.name for path in layout.logs]
    assert names == ["worker_4.log", "worker_5.log", "worker_6.log", "worker_7.log", "launcher_1.log"]


def test_nine_words_for_one_machine_ignore_address_and_node_rank_as_mindformers_does():
    layout = parse([COMMAND, "4", "4", "10.0.0.7", "8118", "3", "logs", "True", "600"])[1]
    assert (layout.master_addr, layout.node_rank, layout.nodes) == ("127.0.0.1", 0, 1)


@pytest.mark.parametrize("count", [0, 3, 4, 5, 7, 8, 10])
def test_other_counts_of_words_show_the_forms(count):
    with pytest.raises(InputError, match=f"these are {count} words") as error:
        parse(["x"] * count)
    for form in ("1 words: COMMAND", "6 words: COMMAND WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT"):
        assert form in str(error.value)


def test_all_wrong_words_are_named_at_once():
    with pytest.raises(InputError) as error:
        parse([COMMAND, "two", "4", "host", "-1", "0", "logs", "maybe", "5s"])
    assert error.value.problems == (
        "WORKER_NUM: 'two' is not a number",
        "MASTER_PORT: '-1' is not a number",
        "JOIN: 'maybe' is not True or False",
        "CLUSTER_TIME_OUT: '5s' is not a number",
    )
