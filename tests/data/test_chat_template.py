"""A chat template's text, marks and refusals equal transformers' `apply_chat_template`."""

import pytest
from chat_styles import STYLES
from text_folders import byte_level_folder

from msft.data.chat_template import ChatTemplate
from msft.data.formats import BadRow, Turn
from msft.data.templates import open_template
from msft.data.tokenizers import open_tokenizer
from msft.errors import InputError

QUESTION, ANSWER = Turn("user", " Why is 1 < 2? é\n"), Turn("assistant", "Because.\n\nIt is. ")
CONVERSATIONS = {
    "question": (None, [QUESTION]),
    "one": (None, [QUESTION, ANSWER]),
    "system": ("Be brief.", [QUESTION, ANSWER]),
    "turns": (None, [QUESTION, ANSWER, Turn("user", "skip"), Turn("assistant", "stop"), QUESTION, ANSWER]),
    "user_twice": (None, [QUESTION, QUESTION, ANSWER]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_level_folder(tmp_path_factory.mktemp("chat"), unk_token="<|endoftext|>")


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def messages(system, turns):
    head = [{"role": "system", "content": system}] if system is not None else []
    return head + [{"role": turn.role, "content": turn.text} for turn in turns]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("style", STYLES)
def test_text_equals_transformers(folder, theirs, style, conversation, prompt):
    ours = ChatTemplate(STYLES[style], open_tokenizer(folder).named_tokens)
    system, turns = CONVERSATIONS[conversation]
    settings = {"chat_template": STYLES[style], "tokenize": False, "add_generation_prompt": prompt}
    try:
        expected = theirs.apply_chat_template(messages(system, turns), **settings)
    except Exception as error:
        with pytest.raises(BadRow, match=r"refused by the chat template") as caught:
            ours.render(system, turns, prompt)
        assert str(error) in str(caught.value)
    else:
        assert ours.render(system, turns, prompt) == expected


def test_some_templates_refuse_some_conversations(folder):
    with pytest.raises(BadRow, match="System role not supported"):
        ChatTemplate(STYLES["renamed"], {}).render("S", [QUESTION])
    with pytest.raises(BadRow, match="roles must alternate"):
        ChatTemplate(STYLES["brackets"], {"bos_token": "<s>"}).render(None, [QUESTION, QUESTION])


def test_generation_marks_equal_transformers(theirs):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = ChatTemplate(STYLES["marked"], {})
    assert template.marks_answers and not ChatTemplate(STYLES["chatml"], {}).marks_answers
    for system, turns in CONVERSATIONS.values():
        texts, marks = render_jinja_template(
            [messages(system, turns)], chat_template=STYLES["marked"], return_assistant_tokens_mask=True
        )
        assert template.render_marked(system, turns) == (texts[0], marks[0])


def test_a_broken_template_is_an_input_error_with_its_line():
    with pytest.raises(InputError, match="chat template 'chat' line 2"):
        ChatTemplate("{{ 1 }}\n{% if %}", {})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ undefined.attribute }}",
        "{{ 1 / 0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_hostile_template_is_refused(source):
    with pytest.raises(BadRow, match="refused by the chat template"):
        ChatTemplate(source, {}).render(None, [QUESTION])


def test_opened_by_name(tmp_path, folder):
    assert open_template("chat", open_tokenizer(folder)).render(None, [QUESTION]).startswith("<|im_start|>user")
    several = byte_level_folder(tmp_path / "several", chat_template=[{"name": "brief", "template": "B"}])
    assert open_template("chat:brief", open_tokenizer(several)).render(None, [QUESTION]) == "B"
    with pytest.raises(InputError, match="no such chat template, did you mean 'brief'.*it has chat:brief"):
        open_template("chat:breif", open_tokenizer(several))
    with pytest.raises(InputError, match="no such chat template"):
        open_template("chat", open_tokenizer(several))
    without = open_tokenizer(byte_level_folder(tmp_path / "without", chat_template=None))
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        open_template("chat", without)
