"""Protects: prompts become the ids that training used, and plain texts start where they must."""

import pytest

from msft.data.templates import DEFAULT_TEMPLATE, chat_or_none, default_template
from msft.data.tokenizers import open_tokenizer
from msft.errors import InputError
from msft.predict.prompts import Prompts, read_prompts


def test_plain_text_gets_the_begin_token_and_an_empty_one_is_just_that(tiny_model):
    tokenizer = open_tokenizer(tiny_model)
    prompts = Prompts(tokenizer, None)
    assert prompts.encode("w5 w6") == [1, 5, 6]
    assert prompts.encode("") == [1]
    assert prompts.stop_ids((7,)) == (2, 7) and prompts.stop_texts() == ()
    assert chat_or_none(tokenizer) is None and default_template(tokenizer) == DEFAULT_TEMPLATE


def test_a_stop_that_is_a_special_token_ends_answers_by_its_id(tiny_model):
    """Special tokens do not show in an answer's text, where they would never be found."""
    prompts = Prompts(open_tokenizer(tiny_model), None)
    assert prompts.stop_ids((), ["<unk>", "w9", "."]) == (0, 2)


def test_a_named_template_frames_the_prompt_and_its_system_message(tiny_model):
    tokenizer = open_tokenizer(tiny_model)
    with_system = Prompts(tokenizer, "vicuna_v1.1", system="w9").encode("w5")
    assert with_system[:2] == [1, 9] and 5 in with_system
    assert Prompts(tokenizer, "vicuna_v1.1").encode("w5") != with_system


def test_prompt_files_are_read_by_line_and_empty_ones_refused(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two \n")
    assert read_prompts(file) == ["one", " two "]
    file.write_bytes("\ufeffone\u2028still one\r\ntwo\fstill two".encode())
    assert read_prompts(file) == ["one\u2028still one", "two\fstill two"]
    file.write_text("\n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(file)
    with pytest.raises(InputError, match="absent.txt: cannot be read"):
        read_prompts(tmp_path / "absent.txt")
