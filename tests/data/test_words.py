"""Texts tokenized by their words have the very tokens of texts tokenized whole, and no word is tokenized twice."""

import copy
import json

import numpy as np
import pytest
import sentencepiece
from chat_styles import STYLES
from hypothesis import given, settings
from hypothesis import strategies as st
from text_folders import CORPUS, TEXTS, byte_level_folder, llama_model, train_sentencepiece

from msft.data import words
from msft.data.chat_template import ChatTemplate
from msft.data.encode import Encoder
from msft.data.formats import BadRow, Conversation, Turn
from msft.data.hf_words import _BY_WORDS
from msft.data.templates import open_template
from msft.data.tokenizers import open_tokenizer
from msft.data.words import Words

GPT2, *NEWER = sorted(_BY_WORDS, key=len)
NUMBERS = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PIPELINES = {
    "gpt2": [{**BYTES, "use_regex": True}],
    "numbers_first": [NUMBERS, split(GPT2), BYTES],
    "digits_first": [DIGITS, {**BYTES, "use_regex": True}],
    "llama3": [split(NEWER[1]), BYTES],
    "qwen2": [split(NEWER[0]), BYTES],
}
OTHER_PIPELINES = {
    "whole_text": [BYTES],
    "numbers_only": [NUMBERS, BYTES],
    "unknown_pattern": [split(r"\w+|\W+"), BYTES],
    "space_first": [{**BYTES, "use_regex": True, "add_prefix_space": True}],
    "removed": [{**split(GPT2), "behavior": "Removed"}, BYTES],
}
HOSTILE = [
    *TEXTS,
    *CORPUS[:4],
    "a b  c   d\n e \n\n f\t g \r\n h\u00a0 i \u3000 j\u2028 k\x1c l\x85 m \u200b n",
    "it's 's don't I'LL  'tis 12 345 6789 a1 b2c 3d !? (x) -- ... \u0301 e \u0301",
    "<|im_start|> user <|im_end|><|im_end|>\n<|im_start |im_end|> < |im_start|>",
    "</s> a </s></s>b <s>\n<s> <unk> x",
    "\u2581a \u2581 b\u2581c \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f9ff x",
    "y" * 200 + " " + "y" * 200,
]
space = st.sampled_from([*" \n\t\r\u00a0\u2028\x1c\x85\u2581", "  ", " \n", "\n ", "'s ", "1 2", "<|im_end|>", "</s>"])
any_text = st.lists(space | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=14).map("".join)


def folder(path, steps, **state):
    byte_level_folder(path)
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    content |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}} | state
    file.write_text(json.dumps(content))
    return path


def library(path):
    """The tokenizers library itself, on whole texts."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = None
    return tokenizer


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    root = tmp_path_factory.mktemp("words")
    folders = {name: folder(root / name, steps) for name, steps in PIPELINES.items()}
    return {name: (open_tokenizer(path), library(path)) for name, path in folders.items()}


@pytest.mark.parametrize("name", PIPELINES)
def test_hostile_texts_equal_the_tokenizers_library(opened, name):
    ours, theirs = opened[name]
    assert ours._words is not None
    for _ in range(2):  # the second time from what was kept
        for text, encoding in zip(HOSTILE, ours.encode(HOSTILE), strict=True):
            expected = theirs.encode(text)
            assert encoding.ids.tolist() == expected.ids, text
            assert list(zip(encoding.starts, encoding.ends, strict=True)) == expected.offsets, text


@pytest.mark.parametrize("name", PIPELINES)
def test_any_texts_equal_the_tokenizers_library(opened, name):
    ours, theirs = opened[name]

    @given(st.lists(any_text, max_size=4))
    @settings(max_examples=100, deadline=None)
    def check(texts):
        assert [each.ids.tolist() for each in ours.encode(texts)] == [theirs.encode(text).ids for text in texts]

    check()


def test_every_character_before_and_after_a_space(opened):
    text = "".join(f"a{chr(code)} {chr(code)}b" for code in [*range(0x3100), *range(0xFE00, 0x10000)])
    for ours, theirs in opened.values():
        assert ours.encode([text])[0].ids.tolist() == theirs.encode(text).ids


@pytest.mark.parametrize("name", OTHER_PIPELINES)
def test_tokenizers_that_look_further_than_a_word_get_whole_texts(tmp_path, name):
    path = folder(tmp_path / name, OTHER_PIPELINES[name])
    ours, theirs = open_tokenizer(path), library(path)
    assert ours._words is None
    assert [each.ids.tolist() for each in ours.encode(HOSTILE)] == [theirs.encode(text).ids for text in HOSTILE]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        *({flag: True} for flag in ("lstrip", "rstrip", "single_word")),
        {"normalized": True},
        {"dropout": 0.5},
    ],
)
def test_other_reasons_for_whole_texts(tmp_path, change):
    path = folder(tmp_path, PIPELINES["gpt2"])
    content = json.loads((path / "tokenizer.json").read_text())
    target = content if "normalizer" in change else content["model"] if "dropout" in change else None
    (content["added_tokens"][0] if target is None else target).update(change)
    (path / "tokenizer.json").write_text(json.dumps(content))
    assert open_tokenizer(path)._words is None


@pytest.fixture(scope="module")
def llama():
    return open_tokenizer(llama_model()), sentencepiece.SentencePieceProcessor(model_file=str(llama_model()))


def whole(model, text):
    """The text as sentencepiece itself reads it, between the control tokens."""
    specials = {"<s>": [1], "</s>": [2], "<unk>": [0]}
    for word, ids in specials.items():
        if word in text:
            before, after = text.split(word, 1)
            return [*whole(model, before), *ids, *whole(model, after)]
    return model.encode(text)


def test_texts_equal_sentencepiece(llama):
    ours, model = llama
    assert ours._words is not None
    for _ in range(2):
        for text, encoding in zip(HOSTILE, ours.encode(HOSTILE), strict=True):
            assert encoding.ids.tolist() == whole(model, text), text


@given(st.lists(any_text, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_texts_equal_sentencepiece(llama, texts):
    ours, model = llama
    assert [each.ids.tolist() for each in ours.encode(texts)] == [whole(model, text) for text in texts]


@pytest.mark.parametrize(
    "more",
    [
        {"model_type": "unigram"},
        {"split_by_whitespace": False},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["\u2581the"]},
        {"normalization_rule_name": "nmt_nfkc"},
    ],
)
def test_models_that_look_further_than_a_word_get_whole_texts(tmp_path, more):
    plain = {
        "model_type": "bpe",
        "vocab_size": 500,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    path = train_sentencepiece(tmp_path / "plain", **plain)
    assert open_tokenizer(path)._words is not None
    path = train_sentencepiece(tmp_path / "other", **(plain | more))
    ours, model = open_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert ours._words is None
    text = "the quick  brown fox the fox"
    assert ours.encode([text])[0].ids.tolist() == model.encode(text)


def test_a_word_is_tokenized_once_and_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(words, "KEPT_WORDS", 4)
    asked = []

    def encode(new):
        asked.extend(new)
        return [[len(word)] * 2 for word in new]

    tokens = Words(encode, {"<s>": 99})
    ids, ends = tokens.encode(["a bb a", "", "<s>bb a<s>"])
    assert ids.tolist() == [1, 1, 3, 3, 2, 2, 99, 2, 2, 2, 2, 99] and ends.tolist() == [6, 6, 12]
    assert ids.dtype == np.int32 and asked == ["a", " bb", " a", "bb"]
    tokens.encode(["a bb a c", "a c", "y" * 100])
    assert asked[4:] == [" c", "y" * 100]  # within a batch, a word is tokenized once even when it is not kept
    tokens.encode(["a bb c"])
    assert asked[6:] == [" c"]


def talk(*texts, system=None):
    return Conversation(tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)), system)


TALKS = [
    talk("What is it?", "It is one.", "And then?", "", "Say more.", "1. Two\n\n2. Three"),
    talk("same", "same  ", "same", "<|im_start|>assistant\nnested", system="Be  brief.\n"),
    talk(" q \n", " \n a <|im_end|> b </s>", system=" "),
    talk("stop", "skip", "\ufdd0", "0"),
    talk("q", " "),
    Conversation((Turn("assistant", "Hi"), Turn("user", "q"), Turn("assistant", "a"), Turn("user", "r"))),
    Conversation((Turn("user", "q"), Turn("user", "q"), Turn("assistant", "a"))),
    *(talk(question, answer) for question, answer in zip(HOSTILE, reversed(HOSTILE), strict=True)),
]


def outcomes(tokenizer, template):
    examples = Encoder(tokenizer, template).encode(TALKS)
    return [str(each) if isinstance(each, BadRow) else (*map(list, each[:2]), each.remarks) for each in examples]


@pytest.mark.parametrize("name", [*STYLES, "vicuna_v1.1", "llama-2", "zephyr", "raw", "one_shot"])
def test_conversations_equal_those_of_whole_texts(opened, llama, name):
    for tokenizer in (opened["numbers_first"][0], llama[0]):
        named = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
        template = ChatTemplate(STYLES[name], named) if name in STYLES else open_template(name, tokenizer)
        by_words = outcomes(tokenizer, template)
        whole_texts = copy.copy(tokenizer)
        whole_texts._words = None
        assert by_words == outcomes(whole_texts, template)
        assert any(not isinstance(each, str) for each in by_words)
