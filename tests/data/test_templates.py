"""FastChat's templates by name write FastChat's own text, for every one of them."""

import pytest
from fastchat.conversation import conv_templates, get_conv_template
from text_folders import byte_level_folder, llama_model

from msft.data.formats import BadRow, Turn
from msft.data.named_template import NamedTemplate, template_names
from msft.data.templates import DEFAULT_TEMPLATE, open_template
from msft.data.tokenizers import open_tokenizer
from msft.errors import InputError

TURNS = (Turn("user", "Why?"), Turn("assistant", "So."), Turn("user", "And\nthen?"), Turn("assistant", "Done."))


def fastchat_text(name, system, turns, prompt):
    conversation = get_conv_template(name)
    if system is not None:
        conversation.set_system_message(system)
    for turn in turns:
        conversation.append_message(conversation.roles[turn.role == "assistant"], turn.text)
    if prompt:
        conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def test_all_templates_with_a_text_form_are_known():
    served_only = {"chatgpt", "pplxai", "bard", "gemini", "steerlm"}
    assert set(template_names()) == set(conv_templates) - served_only
    assert DEFAULT_TEMPLATE == "vicuna_v1.1"


@pytest.mark.parametrize("name", template_names())
def test_text_equals_fastchat(name):
    template = NamedTemplate(name)
    for system in (None, "Be brief."):
        assert template.render(system, TURNS) == fastchat_text(name, system, TURNS, False)
        assert template.render(system, TURNS[:3], prompt=True) == fastchat_text(name, system, TURNS[:3], True)


def test_empty_answers_keep_their_separators():
    empty = (Turn("user", "Why?"), Turn("assistant", ""), *TURNS[2:])
    text = NamedTemplate("vicuna_v1.1").render("S", empty)
    assert text == "S USER: Why? ASSISTANT: </s>USER: And\nthen? ASSISTANT: Done.</s>"


def test_rendering_leaves_fastchats_own_templates_alone():
    NamedTemplate("vicuna_v1.1", {"</s>": "<|end|>"}).render("other", TURNS)
    assert get_conv_template("vicuna_v1.1").messages == []
    assert get_conv_template("vicuna_v1.1").sep2 == "</s>"


@pytest.mark.parametrize("turns", [TURNS[1:], TURNS[:1] * 2, [*TURNS[:2], TURNS[1]]])
def test_turns_must_alternate(turns):
    with pytest.raises(BadRow, match=r"turn \d is the (user|assistant)'s: turns must alternate"):
        NamedTemplate("vicuna_v1.1").render(None, turns)


def test_unknown_names():
    tokenizer = open_tokenizer(llama_model())
    with pytest.raises(InputError, match=r"'vicuna_v1' is unknown, did you mean 'vicuna_v1.1'\? \(known: chat, raw,"):
        open_template("vicuna_v1", tokenizer)
    with pytest.raises(InputError, match="'chatgpt' has no text form"):
        open_template("chatgpt", tokenizer)


def test_llamas_tokens_give_way_to_the_tokenizers_own(tmp_path):
    llama, other = open_tokenizer(llama_model()), open_tokenizer(byte_level_folder(tmp_path))
    assert open_template("vicuna_v1.1", llama).render("S", TURNS[:2]) == "S USER: Why? ASSISTANT: So.</s>"
    assert open_template("vicuna_v1.1", other).render("S", TURNS[:2]) == "S USER: Why? ASSISTANT: So.<|im_end|>"
    said = (Turn("user", "What is </s>?"), Turn("assistant", "A token."))
    assert "What is </s>?" in open_template("vicuna_v1.1", other).render(None, said)
