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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small sentencepiece model of Llama 2's kind: BPE, byte fallback, unknown 0, begin 1, end 2."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(TEXTS[:1] * 20 + TEXTS[6:7] * 20 + TEXTS[1:2]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def test_texts_have_the_ids_of_mindformers_llama_tokenizer(oracle, model, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    oracle("tokenize_texts.py", model, tmp_path / "texts.json", tmp_path / "ids.json")
    tokenizer = open_tokenizer(model)
    theirs = json.loads((tmp_path / "ids.json").read_text())
    assert {text: encode_text(tokenizer, text) for text in TEXTS} == dict(zip(TEXTS, theirs, strict=True))
