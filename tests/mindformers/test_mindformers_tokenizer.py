"""Token ids must be those of MindFormers' tokenizer, or a model trained on one side reads other words on the other."""

import json

import pytest

from msft.data.tokenizers import encode_text, open_tokenizer

pytestmark = pytest.mark.mindformers

TEXTS = [
    "Below is an instruction that describes a task. Write a response.",
    "A chat between a curious user and an artificial intelligence assistant. USER: Hi ASSISTANT: Hello</s>USER: Bye",
    "  two leading spaces, a\ttab and a\nline break ",
    "<s> written out </s>",
    "an <unk> in the text",
    "café, 你好, 🙂: bytes",
    "1 + 22 = 333",
    "a</s>",
    "</s>a",
    "",
]


def test_texts_have_the_ids_of_mindformers_llama_tokenizer(oracle, tokenizer_model, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    oracle("tokenize_texts.py", tokenizer_model, tmp_path / "texts.json", tmp_path / "ids.json")
    tokenizer = open_tokenizer(tokenizer_model)
    theirs = json.loads((tmp_path / "ids.json").read_text())
    assert {text: encode_text(tokenizer, text) for text in TEXTS} == dict(zip(TEXTS, theirs, strict=True))
