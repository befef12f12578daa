"""Protects rows for encoder-decoders: sources, start token, answers; what is cut; who is told that a model is one."""

import json

import numpy as np
import pytest
from text_folders import llama_model

from msft.backend.contract import IGNORE
from msft.cli.llama_preprocess import main
from msft.data.formats import BadRow, Conversation, Turn
from msft.data.mindrecord import open_mindrecord
from msft.data.seq2seq import Seq2SeqEncoder
from msft.data.templates import decoder_start_beside, default_template, open_template
from msft.data.tokenizers import open_tokenizer
from msft.predict.prompts import Prompts
from tests.conformance.families import CONFIGS

START, END = 0, 1


def talk(*texts, system=None):
    return Conversation(tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)), system)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """T5's config.json beside a tokenizer of words w3 .. w127 that closes texts with </s>, as T5's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    place = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(3, 128))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    tokenizer.save(str(place / "tokenizer.json"))
    named = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    (place / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    (place / "config.json").write_text(json.dumps(CONFIGS["t5"]))
    return place


@pytest.fixture
def encoder(folder):
    tokenizer = open_tokenizer(folder)
    assert default_template(tokenizer, "t5") == "plain"
    return Seq2SeqEncoder(tokenizer, open_template("plain", tokenizer), START)


def test_a_row_is_a_source_the_start_token_and_an_answer(encoder):
    (example,) = encoder.encode([talk("w5 w6", "w7", system="w9")])
    assert example.ids.tolist() == [9, 5, 6, END, START, 7, END]
    assert example.labels.tolist() == [IGNORE] * 5 + [7, END]


def test_each_answer_of_a_conversation_is_an_example(encoder):
    parts = encoder.parts(talk("w5", "w6", "w7", "w8", "w9"))
    examples = encoder.encode(parts)
    assert [example.ids.tolist() for example in examples] == [
        [5, END, START, 6, END],
        [5, 6, 7, END, START, 8, END],
    ]
    assert [example.remarks for example in examples] == [(), ("question_without_answer", "earlier_answers")]
    last = Seq2SeqEncoder(encoder._tokenizer, encoder._template, START, last_answer_only=True)
    assert len(last.parts(talk("w5", "w6", "w7", "w8"))) == 1


def test_what_cannot_be_learned_from(encoder):
    nothing, empty = encoder.encode([*encoder.parts(talk("w5")), *encoder.parts(talk("w5", " "))])
    assert isinstance(nothing, BadRow) and str(nothing) == "no answer to a question in it"
    assert (empty.labels == IGNORE).all() and empty.remarks == ("empty_answer",)
    started = Conversation((Turn("assistant", "w4"), Turn("user", "w5"), Turn("assistant", "w6")))
    (example,) = encoder.encode(encoder.parts(started))
    assert example.ids.tolist() == [5, END, START, 6, END] and example.remarks == ("answer_without_question",)


def test_a_source_is_cut_before_its_end_token_and_an_answer_keeps_half_a_row(encoder):
    (long,) = encoder.encode([talk(" ".join(f"w{n}" for n in range(10, 30)), "w7 w8")])
    cut = encoder.cut(long, 10)
    assert cut.ids.tolist() == [10, 11, 12, 13, 14, END, START, 7, 8, END]
    assert cut.labels[cut.labels != IGNORE].tolist() == [7, 8, END]
    (both,) = encoder.encode([talk(" ".join(["w5"] * 9), " ".join(f"w{n}" for n in range(10, 30)))])
    cut = encoder.cut(both, 10)
    assert cut.ids.tolist() == [5, 5, 5, 5, END, START, 10, 11, 12, 13]
    assert encoder.cut(both, 100).ids.tolist() == both.ids.tolist()
    (short,) = encoder.encode([talk("w5", " ".join(f"w{n}" for n in range(10, 30)))])
    assert encoder.cut(short, 6).ids.tolist() == [5, END, START, 10, 11, 12]


def test_prompts_are_what_training_has_as_source(encoder, folder):
    tokenizer = open_tokenizer(folder)
    (example,) = encoder.encode([talk("w5 w6", "w7", system="w9")])
    border = int(np.flatnonzero(example.labels != IGNORE)[0]) - 1
    asked = Prompts(tokenizer, "plain", "w9", is_closed=True).encode("w5 w6")
    assert asked == example.ids[:border].tolist()
    assert Prompts(tokenizer, None, is_closed=True).encode("") == [END]


def test_the_config_beside_a_tokenizer_says_so(folder, tmp_path, capsys):
    assert decoder_start_beside(folder) == START and decoder_start_beside(folder / "tokenizer.json") == START
    assert decoder_start_beside(llama_model()) is None
    rows = [{"instruction": "w5", "input": "w6", "output": "w7"}, {"instruction": "w8", "output": " ".join(["w9"] * 9)}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["--input_glob", str(tmp_path / "rows.json"), "--model_file", str(folder), "--seq_length", "7"]
    words += ["--output_file", str(tmp_path / "a.mindrecord"), "--num_workers", "1"]
    assert main([*words, "--dataset_type", "qa"]) == 0
    said = capsys.readouterr().out
    assert "for an encoder-decoder: sources, then its start token 0, answers" in said and "cut, being too long" in said
    data = open_mindrecord(tmp_path / "a.mindrecord")
    assert data.row(0)["input_ids"].tolist() == [5, 6, END, START, 7, END, 0, 0]
    assert data.row(1)["labels"].tolist() == [IGNORE] * 3 + [9] * 5
    report = json.loads((tmp_path / "a.mindrecord.report.json").read_text())
    assert report["decoder_start_id"] == START and report["tokens"]["cut_off"] == 5
    assert main([*words, "--dataset_type", "wiki", "--overwrite"]) == 2
    assert "running text has no answers" in capsys.readouterr().err
