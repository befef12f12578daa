"""Labels are exact: the supervised tokens are the answers' and no others, for any tokenizer and template."""

import numpy as np
import pytest
import sentencepiece
from chat_styles import STYLES
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from mindformers_oracle import encode as mindformers
from text_folders import byte_level_folder, llama_model, metaspace_folder

from msft.data.encode import Encoder, encode_prompt
from msft.data.ends import answer_ends
from msft.data.formats import BadRow, Conversation, Turn
from msft.data.named_template import template_names
from msft.data.templates import open_template
from msft.data.tokenizers import open_tokenizer
from msft.errors import InputError

IGNORE = -100
QUESTION = "Below is an instruction.\n\n### Instruction:\nName 3 colours. é 你好\n\n### Response:"
WORDS = [
    ("Red, green and blue.",),
    ("1. Red\n2. Green",),
    ("\n starts with a line break",),
    ("😀 and 🧿",),
    ("trailing space ",),
    ("你好，世界。",),
    (" leading",),
    ("a", "b", "c"),
    ("“Quoted”", "• item\n• item", "def f():\n\treturn 1\n"),
]


def talk(*texts, system=None):
    return Conversation(tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)), system)


def dialogue(answers):
    return [text for answer in answers for text in (QUESTION, answer)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("encode")
    return {
        "sentencepiece": open_tokenizer(llama_model()),
        "byte_level": open_tokenizer(byte_level_folder(root / "byte_level")),
        "metaspace": open_tokenizer(metaspace_folder(root / "metaspace", legacy=True)),
    }


def encode(tokenizer, template, *conversations):
    return Encoder(tokenizer, open_template(template, tokenizer)).encode(conversations)


def supervised_text(tokenizer, row):
    return tokenizer.decode(row.ids[row.labels != IGNORE], skip_special=False)


_cache = []


def llama():
    if not _cache:
        tokenizer = open_tokenizer(llama_model())
        model = sentencepiece.SentencePieceProcessor(model_file=str(llama_model()))
        _cache.extend((tokenizer, model, Encoder(tokenizer, open_template("vicuna_v1.1", tokenizer))))
    return _cache


texts = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=60)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.integers(20, 120))
@example([(QUESTION, answers[0]) for answers in WORDS], 2048)
@example([("Tell me about 1 + 1", "2"), ("Why?", " spaces  inside "), ("x ASSISTANT", "USER: no")], 400)
@example([("\ufdd0", "0")], 35)
@settings(max_examples=150, deadline=None)
def test_vicuna_equals_mindformers_where_its_bookkeeping_is_right(rounds, length):
    tokenizer, model, encoder = llama()
    turns = [text for each in rounds for text in each]
    assume(all(turn.strip() for turn in turns))
    assume(not any(word in turn for turn in turns for word in ("</s>", "<s>", "<unk>")))
    ids, labels, agrees = mindformers(model, turns, length)
    assume(agrees)
    row = encoder.encode([talk(*turns)])[0]
    ours = np.zeros(length, int), np.full(length, IGNORE)
    for array, values in zip(ours, (row.ids, row.labels), strict=True):
        array[: min(length, len(values))] = values[:length]
    assert ours[0].tolist() == ids
    assert ours[1].tolist() == labels


def test_mindformers_masks_rows_that_we_get_right():
    """Its split at ' ASSISTANT: ' loses a row that quotes it; ours is tracked."""
    tokenizer, model, encoder = llama()
    turns = ["Quote the role", "It writes ASSISTANT: before an answer."]
    *_, agrees = mindformers(model, turns, 200)
    assert not agrees
    row = encoder.encode([talk(*turns)])[0]
    assert supervised_text(tokenizer, row) == "It writes ASSISTANT: before an answer.</s>"


@pytest.mark.parametrize("answers", WORDS)
@pytest.mark.parametrize("name", ["sentencepiece", "byte_level", "metaspace"])
@pytest.mark.parametrize("template", ["vicuna_v1.1", "llama-2", "zephyr", "one_shot", "chat"])
def test_the_supervised_tokens_spell_the_answers(tokenizers, tmp_path, name, template, answers):
    tokenizer = tokenizers[name]
    if template == "chat":
        tokenizer.chat_templates = {"default": STYLES["chatml"]}
    row = encode(tokenizer, template, talk(*dialogue(answers)))[0]
    finder_text = supervised_text(tokenizer, row)
    mark = answer_ends(tokenizer, template).mark
    squeezed = "".join((answer + mark) for answer in answers)
    assert "".join(finder_text.split()) == "".join(squeezed.split())
    assert row.ids.dtype == row.labels.dtype == np.int32
    assert set(row.labels[row.labels != IGNORE] - row.ids[row.labels != IGNORE]) == {0}


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_words_are_supervised_whole_and_questions_are_not(rounds):
    tokenizer, _, _ = llama()
    tokenizer.chat_templates = {"default": STYLES["chatml"]}
    turns = [text for each in rounds for text in each]
    assume(all(answer.strip() for answer in turns[1::2]))
    row = encode(tokenizer, "chat", talk(*turns))[0]
    text = open_template("chat", tokenizer).render(None, talk(*turns).turns)
    spans = tokenizer.encode([text])[0]
    expected, place = np.zeros(len(text) + 1, bool), 0
    for question, answer in rounds:
        place += len("<|im_start|>user\n" + question + "<|im_end|>\n<|im_start|>assistant\n")
        end = place + len(answer + "<|im_end|>")
        expected[place:end], place = True, end + 1
    for label, start, end in zip(row.labels, spans.starts, spans.ends, strict=True):
        assert (label != IGNORE) == expected[start : max(end, start + 1)].any()


def test_a_token_across_the_border_belongs_to_the_answer(tokenizers):
    tokenizer, model, _ = llama()
    assert model.encode("The capital is Paris", out_type=str)[-1] == "▁Paris"
    row = encode(tokenizer, "raw", talk("The capital is Par", "is"))[0]
    assert supervised_text(tokenizer, row) == "Paris</s>"


def test_a_token_of_no_characters_belongs_to_what_follows():
    tokenizer, model, _ = llama()
    expected = [*model.encode("\nHi"), tokenizer.eos_id]
    assert model.encode("\nHi", out_type=str)[0] == "▁"
    row = encode(tokenizer, "phoenix", talk("q", "\nHi"))[0]
    assert row.ids[row.labels != IGNORE].tolist() == expected


@pytest.mark.parametrize("style", ["chatml", "default_system", "headers", "brackets", "thoughts", "marked"])
def test_chat_ids_and_masks_equal_transformers(tmp_path, style):
    from transformers import AutoTokenizer

    folder = byte_level_folder(tmp_path, chat_template=STYLES[style])
    ours, theirs = open_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for answers in WORDS:
        turns = dialogue([answer.strip() for answer in answers])
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
        row = encode(ours, "chat", talk(*turns))[0]
        expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
        assert row.ids.tolist() == expected["input_ids"]
        if style == "marked":
            assert (row.labels != IGNORE).astype(int).tolist() == expected["assistant_masks"]
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert encode_prompt(ours, "chat", messages[:-1]) == prompt


@pytest.mark.parametrize("template", [name for name in template_names() if name != "yuan2"])
def test_a_prompt_is_what_the_answer_follows_in_training(tokenizers, template):
    tokenizer = tokenizers["sentencepiece"]
    row = encode(tokenizer, template, talk("Hi there", "Hello.", "Name a colour", "Red"))[0]
    messages = [("user", "Hi there"), ("assistant", "Hello."), ("user", "Name a colour")]
    prompt = encode_prompt(tokenizer, template, [{"role": role, "content": text} for role, text in messages])
    # A space at the prompt's end is a token of its own; in training it joins the answer's first word.
    same = len(prompt) - 1 if prompt[-1] != row.ids[len(prompt) - 1] else len(prompt)
    assert row.ids[:same].tolist() == prompt[:same]
    assert row.labels[same - 1] == IGNORE and row.labels[same] != IGNORE


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level"])
def test_an_answer_without_end_mark_gets_the_end_token(tokenizers, name):
    tokenizer = tokenizers[name]
    row = encode(tokenizer, "raw", talk("q", "a \n"))[0]
    assert row.ids[-1] == row.labels[-1] == tokenizer.eos_id
    assert tokenizer.decode(row.ids[:-1]) == "qa"
    assert answer_ends(tokenizer, "raw") == ("", (tokenizer.eos_id,), ())


def test_begin_tokens_come_once(tokenizers, tmp_path):
    tokenizer = tokenizers["sentencepiece"]
    for template in ("vicuna_v1.1", "llama-2", "llama2-chinese"):
        ids = encode(tokenizer, template, talk("q", "a"))[0].ids.tolist()
        assert ids[0] == tokenizer.bos_id and tokenizer.bos_id not in ids[1:5]
    tokenizer.chat_templates = {"default": STYLES["brackets"]}
    assert encode(tokenizer, "chat", talk("q", "a"))[0].ids.tolist().count(tokenizer.bos_id) == 1
    assert encode(tokenizers["byte_level"], "raw", talk("q", "a"))[0].ids[0] != tokenizers["byte_level"].bos_id


def test_what_is_left_out_is_remarked(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    greeting = Conversation((Turn("assistant", "Hi"), *talk("q", "a", "r").turns))
    rows = encode(tokenizer, "vicuna_v1.1", greeting, talk("q", "", "r", "b"), talk("</s>", "b"), talk("q", " "))
    assert rows[0].remarks == ("answer_without_question", "question_without_answer")
    assert supervised_text(tokenizer, rows[0]) == "a</s>"
    assert rows[1].remarks == ("empty_answer",) and supervised_text(tokenizer, rows[1]) == "b</s>"
    assert rows[2].remarks == ("special_in_words",)
    assert rows[3].remarks == ("empty_answer",) and (rows[3].labels == IGNORE).all()
    (row,) = encode(tokenizer, "yuan", talk("q", "a", system="Be brief."))
    assert "system_left_out" in row.remarks
    assert encode(tokenizer, "vicuna_v1.1", talk("q", "a", system="Be brief."))[0].remarks == ()


@pytest.mark.parametrize("turns", [(), (Turn("user", "q"),), (Turn("assistant", "a"),)])
def test_conversations_without_an_answer_to_a_question_are_bad(tokenizers, turns):
    (row,) = encode(tokenizers["sentencepiece"], "vicuna_v1.1", Conversation(turns))
    assert isinstance(row, BadRow) and str(row) == "no answer to a question in it"


def test_bad_conversations_leave_the_others_in_place(tokenizers):
    twice = Conversation((Turn("user", "q"), Turn("user", "q"), Turn("assistant", "a")))
    rows = encode(tokenizers["sentencepiece"], "vicuna_v1.1", talk("q", "one"), twice, talk("q", "two"))
    assert isinstance(rows[1], BadRow) and "turns must alternate" in str(rows[1])
    assert [supervised_text(tokenizers["sentencepiece"], row) for row in rows[::2]] == ["one</s>", "two</s>"]


def test_stops(tokenizers):
    tokenizer, chat = tokenizers["sentencepiece"], tokenizers["byte_level"]
    assert answer_ends(tokenizer, "vicuna_v1.1") == ("</s>", (2,), ())
    assert answer_ends(chat, "chat").ids == (chat.eos_id,)
    assert answer_ends(tokenizer, "one_shot").texts == ("###",)
    # mpt's stop ids mean other tokens here, and its end mark is plain text for this tokenizer.
    assert answer_ends(tokenizer, "mpt-7b-chat") == ("<|im_end|>", (0, 2), ("<|im_end|>",))
    assert answer_ends(tokenizer, None, (7, 2)) == ("", (2, 7), ())


def test_prompts_that_cannot_be(tokenizers):
    with pytest.raises(InputError, match="unknown role 'tool'"):
        encode_prompt(tokenizers["sentencepiece"], "vicuna_v1.1", [{"role": "tool", "content": "x"}])
    with pytest.raises(InputError, match="turns must alternate"):
        encode_prompt(tokenizers["sentencepiece"], "vicuna_v1.1", [{"role": "user", "content": "x"}] * 2)
