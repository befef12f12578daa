"""The answers found in a text are the assistant's words with their end marks, in every template, and nothing else."""

import pytest
from chat_styles import STYLES
from text_folders import byte_level_folder, llama_model

from msft.data.answers import AnswerFinder
from msft.data.chat_template import ChatTemplate
from msft.data.formats import BadRow, Conversation, Turn
from msft.data.named_template import template_names
from msft.data.templates import open_template
from msft.data.tokenizers import open_tokenizer

NAMES = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>", "<s>"]


def talk(*texts, system=None):
    return Conversation(tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)), system)


def answers(template, conversation, specials=SPECIALS):
    located = AnswerFinder(template, specials).locate(conversation)
    return [located.text[start:end] for start, end in located.answers], located


THREE = talk("What is it?", "It is one.", "And then?", "", "Say more.", "1. Two\n\n2. Three")


@pytest.mark.parametrize("name", template_names())
def test_every_fastchat_template(name):
    template = open_template(name, open_tokenizer(llama_model()))
    found, located = answers(template, THREE)
    # The empty answer in the middle is not supervised.
    assert len(found) == 2
    for answer, words in zip(found, ("It is one.", "1. Two\n\n2. Three"), strict=True):
        assert words.replace("\n\n", "\n") in answer.replace("\n\n", "\n")
        before, _, after = answer.replace("\n\n", "\n").partition(words.replace("\n\n", "\n"))
        assert before.strip() == ""
        # yuan2 ends only the whole conversation, so that an earlier answer has no mark.
        assert after.strip() == ("" if name == "yuan2" and "one" in words else located.end_mark.strip())
    for question in ("What is it?", "And then?", "Say more."):
        assert not any(question in answer for answer in found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vicuna_v1.1", [" It is one.</s>", " 1. Two\n\n2. Three</s>"]),
        ("llama-2", [" It is one. </s>", " 1. Two\n\n2. Three </s>"]),
        ("zephyr", ["It is one.</s>", "1. Two\n\n2. Three</s>"]),
        ("one_shot", [" It is one.\n###", " 1. Two\n\n2. Three\n###"]),
        ("dolly_v2", ["It is one.### End", "1. Two\n\n2. Three### End"]),
        ("raw", ["It is one.", "1. Two\n\n2. Three"]),
    ],
)
def test_answers_begin_where_the_opening_ends_and_end_with_their_mark(name, expected):
    assert answers(open_template(name, open_tokenizer(llama_model())), THREE)[0] == expected


@pytest.mark.parametrize(
    ("style", "expected", "departures"),
    [
        ("chatml", ["It is one.<|im_end|>", "1. Two\n\n2. Three<|im_end|>"], 0),
        ("default_system", ["It is one.<|im_end|>", "1. Two\n\n2. Three<|im_end|>"], 0),
        ("headers", ["It is one.<|im_end|>", "1. Two\n\n2. Three<|im_end|>"], 0),
        ("brackets", [" It is one. <|im_end|>", " 1. Two\n\n2. Three <|im_end|>"], 0),
        ("renamed", ["It is one.<|im_end|>", "1. Two\n\n2. Three<|im_end|>"], 0),
        ("thoughts", ["It is one.<|im_end|>", "<think>\n\n</think>\n\n1. Two\n\n2. Three<|im_end|>"], 0),
        ("opened_thought", ["It is one.<|im_end|>", "1. Two\n\n2. Three<|im_end|>"], 2),
        ("endless", [" It is one.", " 1. Two\n\n2. Three"], 0),
        ("marked", ["It is one.<|im_end|>", "1. Two\n\n2. Three<|im_end|>"], 0),
    ],
)
def test_chat_templates(style, expected, departures):
    found, located = answers(ChatTemplate(STYLES[style], NAMES), THREE)
    assert found == expected and located.departures == departures
    assert located.end_mark == ("" if style == "endless" else "<|im_end|>")


def test_words_that_repeat_the_question_or_the_template():
    template = ChatTemplate(STYLES["chatml"], NAMES)
    for words in ("assistant", "im", "user\nsame", "<|im_start|>assistant\nnested", "a", "same  "):
        conversation = talk("same", words, "same", words)
        text = template.render(None, conversation.turns)
        found, located = answers(template, conversation)
        assert located.text == text
        assert found == [words + "<|im_end|>"] * 2


def test_an_end_token_written_in_the_words_does_not_end_the_answer():
    found, _ = answers(ChatTemplate(STYLES["chatml"], NAMES), talk("q", "a <|im_end|> b"))
    assert found == ["a <|im_end|> b<|im_end|>"]


def test_a_template_that_changes_words():
    shout = STYLES["chatml"].replace("message['content']", "message['content'] | upper")
    found, _ = answers(ChatTemplate(shout, NAMES), talk("q", "a", "r", "b"))
    assert found == ["A<|im_end|>", "B<|im_end|>"]
    lost = "{% for m in messages %}{{ m.content | upper }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(BadRow, match="rewrites turn 2"):
        answers(ChatTemplate(lost, NAMES), talk("q", "a"))


def test_a_tokenizer_without_special_tokens(tmp_path):
    tokenizer = open_tokenizer(byte_level_folder(tmp_path))
    found, located = answers(open_template("vicuna_v1.1", tokenizer), talk("q", "a"), specials=[])
    assert found == [" a<|im_end|>"] and located.end_mark == "<|im_end|>"
