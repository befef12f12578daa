"""The text and the supervised part of LLaMA-Factory's and Firefly's templates, to the character."""

import pytest
from text_folders import byte_level_folder

from msft.data.encode import Encoder, encode_prompt
from msft.data.formats import Conversation, Turn
from msft.data.named_template import NamedTemplate
from msft.data.templates import open_template
from msft.data.tokenizers import open_tokenizer
from msft.data.turn_formats import TOOLKITS, open_turn_format
from msft.errors import InputError

TURNS = (Turn("user", "A b"), Turn("assistant", "C"), Turn("user", "d"), Turn("assistant", "E"))


class Named:
    """A tokenizer, as far as templates see it."""

    named_tokens = {"bos_token": "<s>", "eos_token": "</s>"}


# Written by hand from the toolkits' own descriptions: with the system message S, and the answers in brackets.
WRITTEN = {
    "llama_factory:alpaca": (
        "S### Instruction:\nA b\n\n### Response:\n[C</s>\n\n]### Instruction:\nd\n\n### Response:\n[E</s>\n\n]"
    ),
    "llama_factory:default": "System: S</s>\nHuman: A b</s>\nAssistant:[C</s>\n]Human: d</s>\nAssistant:[E</s>\n]",
    "llama_factory:llama2": ("<s>{INST} <<SYS>>\nS\n<</SYS>>\n\nA b {/INST}[C</s>]<s>{INST} d {/INST}[E</s>]"),
    "llama_factory:mistral": "<s>{INST} S\n\nA b{/INST}[ C</s>]{INST} d{/INST}[ E</s>]",
    "llama_factory:llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nA b<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[C<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\nd<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[E<|eot_id|>]"
    ),
    "llama_factory:qwen3": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA b<|im_end|>\n"
        "<|im_start|>assistant\n[<think>\n\n</think>\n\nC<|im_end|>\n]<|im_start|>user\nd<|im_end|>\n"
        "<|im_start|>assistant\n[<think>\n\n</think>\n\nE<|im_end|>\n]"
    ),
    "llama_factory:gemma": (
        "<s><start_of_turn>user\nS\n\nA b<end_of_turn>\n<start_of_turn>model\n[C<end_of_turn>\n]"
        "<start_of_turn>user\nd<end_of_turn>\n<start_of_turn>model\n[E<end_of_turn>\n]"
    ),
    "llama_factory:empty": "SA b[C]d[E]",
    "firefly:qwen": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA b<|im_end|>\n<|im_start|>assistant\n[C<|im_end|>\n]"
        "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n[E<|im_end|>\n]"
    ),
    "firefly:default": "System: S\n\nUser: A b\nAssistant: [C </s>]User: d\nAssistant: [E </s>]",
    "firefly:mistral": "<s>{INST}A b{/INST}[C</s>]{INST}d{/INST}[E</s>]",
    "firefly:baichuan2": "<reserved_106>A b<reserved_107>[C</s>]<reserved_106>d<reserved_107>[E</s>]",
    "firefly:plain": "<s>A b</s>[C</s>]d</s>[E</s>]",
}


def bracketed(text, marks):
    """A text with its answers in brackets, and its own brackets as braces."""
    for number, (start, end) in enumerate(marks):
        start, end = start + 2 * number, end + 2 * number
        text = f"{text[:start]}\1{text[start:end]}\2{text[end:]}"
    return text.replace("[", "{").replace("]", "}").replace("\1", "[").replace("\2", "]")


@pytest.mark.parametrize("name", WRITTEN)
def test_text_and_answers_are_those_of_the_toolkit(name):
    assert bracketed(*open_turn_format(name, Named).render_marked("S", TURNS)) == WRITTEN[name]


@pytest.mark.parametrize("name", [f"{toolkit}:{name}" for toolkit, known in TOOLKITS.items() for name in known])
def test_every_template_asks_as_it_trains(name):
    template = open_turn_format(name, Named)
    asked = template.render("S", TURNS[:3], prompt=True)
    text, marks = template.render_marked("S", TURNS)
    assert text.startswith(asked) and marks[-1] == (len(asked), len(text)) and len(marks) == 2


@pytest.mark.parametrize(
    ("name", "system"), [("llama_factory:qwen", "S"), ("firefly:qwen", None), ("firefly:qwen", "S")]
)
def test_qwens_text_is_fastchats(name, system):
    """FastChat has no other of these templates word for word: theirs end answers otherwise or say no system message."""
    assert open_turn_format(name, Named).render(system, TURNS) == NamedTemplate("qwen-7b-chat").render(system, TURNS)


def test_a_default_system_message_is_said_where_the_data_has_none():
    template = open_turn_format("llama_factory:vicuna", Named)
    text = template.render(None, TURNS[:2])
    assert text.startswith("A chat between a curious user") and text.endswith("questions.USER: A b ASSISTANT:C</s>")
    assert (
        open_turn_format("llama_factory:llama3", Named).render(None, TURNS[:1]).startswith("<s><|start_header_id|>user")
    )


def test_a_thought_of_the_data_is_kept_and_firefly_strips_words():
    turns = (Turn("user", "a"), Turn("assistant", "<think>x</think>b"))
    assert "assistant\n<think>x</think>b<|im_end|>" in open_turn_format("llama_factory:qwen3", Named).render(
        None, turns
    )
    padded = (Turn("user", " a\n"), Turn("assistant", " b "))
    assert open_turn_format("firefly:minicpm", Named).render(None, padded) == "<用户>a<AI>b</s>"


def test_all_of_an_answer_is_supervised_what_stands_behind_its_end_mark_too(tmp_path):
    tokenizer = open_tokenizer(byte_level_folder(tmp_path / "tokenizer"))
    (example,) = Encoder(tokenizer, open_template("llama_factory:chatml", tokenizer)).encode([Conversation(TURNS)])
    assert tokenizer.decode(example.labels[example.labels != -100], False) == "C<|im_end|>\nE<|im_end|>\n"
    (last,) = Encoder(tokenizer, open_template("llama_factory:chatml", tokenizer), True).encode([Conversation(TURNS)])
    assert (last.ids == example.ids).all()
    assert tokenizer.decode(last.labels[last.labels != -100], False) == "E<|im_end|>\n"
    asked = encode_prompt(tokenizer, "llama_factory:chatml", [{"role": "user", "content": "A b"}])
    assert example.ids[: len(asked)].tolist() == asked


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        InputError, match="'firefly:qwn' is unknown, did you mean 'firefly:qwen'\\? \\(known: firefly:bai"
    ):
        open_turn_format("firefly:qwn", Named)
