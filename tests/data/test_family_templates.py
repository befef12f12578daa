"""Protects every family's prompts: their text, and that what ends an answer is one token, learned and stopped at."""

import pytest
from family_formats import FORMATS
from fastchat.conversation import get_conv_template
from text_folders import byte_level_folder

from msft.backend.contract import IGNORE
from msft.data.encode import Encoder, encode_prompt
from msft.data.ends import answer_ends
from msft.data.formats import Conversation, Turn
from msft.data.templates import CHAT, default_template, model_type_beside, open_template
from msft.data.tokenizers import open_tokenizer
from msft.models.families import FAMILIES

TURNS = (Turn("user", "Why?"), Turn("assistant", "So."), Turn("user", "And then?"), Turn("assistant", "Done."))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each family's tokenizer, with its own chat template and without one, beside a config.json."""
    place = tmp_path_factory.mktemp("families")
    for family, form in FORMATS.items():
        specials = dict.fromkeys(["<unk>", form.begin, form.end, *form.others])
        named = {"bos_token": form.begin, "eos_token": form.end, "pad_token": form.end}
        for kind, template in ((CHAT, form.template), ("named", None)):
            folder = byte_level_folder(place / family / kind, tuple(specials), **named, chat_template=template)
            (folder / "config.json").write_text(f'{{"model_type": "{family}"}}')
    return place


CASES = [
    (family, kind) for family, form in FORMATS.items() for kind in (CHAT, "named") if form.template or kind != CHAT
]


@pytest.fixture(params=CASES, ids="-".join)
def case(request, folders):
    """A family's format, its tokenizer and folder, the template that it gets where none is named, its end."""
    family, kind = request.param
    form, folder = FORMATS[family], folders / family / kind
    tokenizer = open_tokenizer(folder)
    name = default_template(tokenizer, model_type_beside(folder))
    return form, folder, tokenizer, name, form.ends if kind == CHAT else form.named


def test_every_family_has_a_format():
    assert FORMATS.keys() == FAMILIES.keys()


def test_the_text_is_transformers_or_fastchats(case):
    from transformers import AutoTokenizer

    form, folder, tokenizer, name, _ = case
    text = open_template(name, tokenizer).render(None, TURNS)
    if name == CHAT:
        messages = [{"role": turn.role, "content": turn.text} for turn in TURNS]
        assert text == AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
        return
    if name == "plain":
        assert text == "Why?\nSo.\nAnd then?\nDone."
        return
    theirs = get_conv_template(name)
    for turn in TURNS:
        theirs.append_message(theirs.roles[turn.role == "assistant"], turn.text)
    # FastChat writes Llama's end of a text; a tokenizer that has another gets that.
    assert text == theirs.get_prompt().replace("</s>", form.end)


def test_an_answers_end_is_one_token_that_generation_stops_at(case):
    form, _, tokenizer, name, end = case
    (end_id,) = tokenizer.encode([end])[0].ids.tolist()
    template = open_template(name, tokenizer)
    example = Encoder(tokenizer, template).encode([Conversation(TURNS)])[0]
    learned = example.labels[example.labels != IGNORE].tolist()
    assert learned[-1] == end_id and tokenizer.decode(learned[-2:], skip_special=False).endswith(f".{end}")
    ends = answer_ends(tokenizer, template)
    assert end_id in ends.ids
    wanted = form.stops if end == form.ends else (form.named,)
    assert {tokenizer.special_tokens[stop] for stop in wanted} <= set(ends.ids)
    assert ends.mark in ("", end)


def test_an_answer_follows_the_prompt_that_asks_for_it(case):
    """What generation asks with is what training has before the answer."""
    _, _, tokenizer, name, _ = case
    template = open_template(name, tokenizer)
    asked = encode_prompt(tokenizer, template, [{"role": "user", "content": "Why?"}])
    example = Encoder(tokenizer, template).encode([Conversation(TURNS[:2])])[0]
    same = next(number for number, label in enumerate(example.labels) if label != IGNORE)
    assert example.ids[:same].tolist() == asked[:same] and len(asked) - same <= 1


def test_ends_that_the_model_names_stop_generation_too(folders):
    tokenizer = open_tokenizer(folders / "glm" / CHAT)
    observation = tokenizer.special_tokens["<|observation|>"]
    assert observation not in answer_ends(tokenizer, CHAT).ids
    assert observation in answer_ends(tokenizer, CHAT, (observation,)).ids
