"""Protects ChatGLM-6B's tokenizer and rows: the release's numbers and spelling, [gMASK] <sop> before an answer."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from text_folders import train_sentencepiece

from msft.backend.contract import IGNORE
from msft.data.encode import Encoder, encode_prompt
from msft.data.ends import answer_ends
from msft.data.formats import Conversation, Turn
from msft.data.preprocess import Options, preprocess
from msft.data.templates import default_template, model_type_beside, open_template
from msft.data.tokenizers import encode_text, open_tokenizer
from msft.errors import InputError
from msft.predict.prompts import Prompts

OWN = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"]
SPELLED = ["<n>", "<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81))]
TURNS = (Turn("user", "Why?"), Turn("assistant", "So."), Turn("user", "And then?"), Turn("assistant", "Done\n  it."))


@pytest.fixture(scope="module", params=[0, 20000])
def folder(request, tmp_path_factory):
    """A vocabulary of the release's kind, with image tokens before its own and without."""
    place = tmp_path_factory.mktemp("chatglm")
    trained = train_sentencepiece(
        place / "trained",
        vocab_size=440,
        model_type="unigram",
        byte_fallback=True,
        pad_id=3,
        user_defined_symbols=[*OWN, *SPELLED],
    )
    folder = place / "model"
    folder.mkdir()
    shutil.copyfile(trained, folder / "ice_text.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": request.param}))
    gmask = sentencepiece.SentencePieceProcessor(model_file=str(trained)).piece_to_id("[gMASK]") + request.param
    config = {"model_type": "chatglm", "position_encoding_2d": True, "gmask_token_id": gmask}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def released(folder, text):
    """The ids of the release's own steps: words for white space, the longest blanks first, then sentencepiece."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))
    before = json.loads((folder / "tokenizer_config.json").read_text())["num_image_tokens"]
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for count in range(80, 1, -1):
        text = text.replace(" " * count, f"<|blank_{count}|>")
    return [index + before for index in model.encode(text)]


def test_ids_are_the_releases_and_each_token_knows_its_characters(folder):
    tokenizer = open_tokenizer(folder)
    texts = ["Hello  world", "a\n\n\tb" + " " * 170 + "c", "", "\n", "def f(x):\n    return  x", "你好世界 😀", " a "]
    for text, found in zip(texts, tokenizer.encode(texts), strict=True):
        assert found.ids.tolist() == released(folder, text)
        assert tokenizer.decode(found.ids) == text.strip() if text.strip() else True
        spans = "".join(text[start:end] for start, end in zip(found.starts, found.ends, strict=True))
        assert spans.replace(" ", "") == text.replace(" ", "") or "😀" in text


@settings(max_examples=60, deadline=None)
@given(text=st.text("ab \n\t", max_size=120))
def test_any_white_space_is_spelled_as_the_release_does(folder, text):
    (found,) = open_tokenizer(folder).encode([text])
    assert found.ids.tolist() == released(folder, text)
    assert (found.starts <= found.ends).all() and (np.diff(found.starts) >= 0).all()
    assert found.ends.max(initial=0) <= len(text)


def test_a_question_ends_with_gmask_and_sop_and_its_answer_with_eop(folder):
    tokenizer = open_tokenizer(folder)
    special = tokenizer.special_tokens
    gmask, sop, eop = (special[word] for word in ("[gMASK]", "<sop>", "<eop>"))
    name = default_template(tokenizer, model_type_beside(folder))
    assert name == "chatglm"
    template = open_template(name, tokenizer)
    (example,) = Encoder(tokenizer, template).encode([Conversation(TURNS)])
    question = released(folder, "[Round 0]\n问：Why?\n答：So.\n[Round 1]\n问：And then?\n答：")
    answer = [*released(folder, "Done\n  it."), eop]
    assert example.ids.tolist() == [*question, gmask, sop, *answer]
    assert example.labels.tolist() == [IGNORE] * (len(question) + 2) + answer
    assert example.remarks == ("earlier_answers_read_only",)
    messages = [{"role": turn.role, "content": turn.text} for turn in TURNS[:3]]
    assert encode_prompt(tokenizer, template, messages) == [*question, gmask, sop]
    assert Prompts(tokenizer, None).encode("Why?") == [*released(folder, "Why?"), gmask, sop]
    assert encode_text(tokenizer, "Why?") == [*released(folder, "Why?"), gmask, sop]
    assert answer_ends(tokenizer, template).ids == (eop,)
    assert tokenizer.decode(answer) == "Done\n  it." and tokenizer.decode([eop], skip_special=False).strip() == "<eop>"


def test_an_empty_answer_leaves_nothing_supervised_and_other_rows_as_they_are(folder):
    tokenizer = open_tokenizer(folder)
    encoder = Encoder(tokenizer, open_template("chatglm", tokenizer))
    empty = Conversation((TURNS[0], Turn("assistant", "")))
    nothing, example = encoder.encode([empty, Conversation(TURNS)])
    assert (nothing.labels == IGNORE).all() and nothing.remarks == ("empty_answer",)
    assert example.ids.tolist() == encoder.encode([Conversation(TURNS)])[0].ids.tolist()


@pytest.mark.parametrize("kind", ["wiki", "text"])
def test_running_text_which_the_engines_would_refuse_is_refused_before(kind, folder, tmp_path):
    (tmp_path / "a.txt").write_text("Some words.")
    options = Options(str(tmp_path / "a.txt"), str(folder), str(tmp_path / "x.mindrecord"), kind)
    with pytest.raises(InputError, match=f"--dataset_type {kind}: running text has no answers"):
        preprocess(options)


def test_copies_are_read_again_and_other_numbers_refused(folder, tmp_path):
    tokenizer = open_tokenizer(folder)
    tokenizer.save_copy(tmp_path / "copy")
    assert open_tokenizer(tmp_path / "copy").special_tokens == tokenizer.special_tokens
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"gmask_token_id": config["gmask_token_id"] + 7}))
    fitting = json.loads((folder / "tokenizer_config.json").read_text())["num_image_tokens"] + 7
    with pytest.raises(InputError, match=f"num_image_tokens {fitting} would fit"):
        open_tokenizer(other)
    (other / "tokenizer_config.json").write_text('{"num_image_tokens": "many"}')
    with pytest.raises(
        InputError, match="num_image_tokens of tokenizer_config.json must be a whole number, not 'many'"
    ):
        open_tokenizer(other)
    plain = train_sentencepiece(tmp_path / "plain", vocab_size=120)
    shutil.copyfile(plain, tmp_path / "ice_text.model")
    with pytest.raises(InputError, match=r"has no <sop> \(bos_token\), so it is not ChatGLM-6B's vocabulary"):
        open_tokenizer(tmp_path / "ice_text.model")
