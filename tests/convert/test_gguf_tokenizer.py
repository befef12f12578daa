"""Tokenizers that went into a GGUF come out giving the same ids: trained here, or read by other people's code."""

import importlib.resources
import io
import json
import random

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from msft.convert.gguf_tokenizer import tokenizer_files
from msft.errors import InputError

WORDS = (
    "the quick brown fox jumps over lazy dogs while Anna counts 12345 sheep in 1984 and it's fine we'll see "
    "Grüße aus Köln naïve façade ÉCOLE straße 日本語 テスト 한국어 Привет мир שלום مرحبا 😀 👩‍👩‍👧 ½ ² ①"
).split()
TEXTS = [
    "Hello world",
    " leading",
    "trailing ",
    "  two  spaces   three",
    "a\n\n b\t\tc\r\nd",
    "12345 678",
    "x = 3.14e-5;",
    "  12",
    ":\n\n2. second\n 3. third",
    "don't I'LL it's we've",
    "    def f(x):\n        return x + 1\n",
    "",
    " ",
    "   ",
    "é e\u0301 \u00a0nbsp\u200bzero\u3000wide",
    "日本語のテスト。12個",
    "😀👩‍👩‍👧 ½①",
    "\x00\x01\ufffd",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|><|im_end|>text<|im_end|>",
    "a<think>b",
    "snake_case camelCase HTTPServer2 v1.2.3 (a,b) [c] {d}…",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def corpus(seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    made = [
        " " * rng.choice([0, 0, 1, 3]) + rng.choice([" ", " ", "\n", "  "]).join(rng.choices(WORDS, k=12))
        for _ in range(200)
    ]
    return TEXTS + made


def write_gguf(path, metadata):
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_embedding_length, 8),
        (writer.add_feed_forward_length, 8),
        (writer.add_head_count, 2),
        (writer.add_context_length, 512),
    ):
        add(value)
    for name, value in metadata.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def load(files, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


def trained(splits) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(1) * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return tokenizer


def metadata_of(tokenizer: Tokenizer, pre: str) -> dict:
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = [
        " ".join(merge) if isinstance(merge, list) else merge
        for merge in json.loads(tokenizer.to_str())["model"]["merges"]
    ]
    kinds = [3 if token in SPECIAL else 4 if token == "<think>" else 1 for token, _ in vocabulary]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": [token for token, _ in vocabulary],
        "token_types": kinds,
        "token_merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
        "pad_token_id": 2,
        "add_bos_token": False,
        "chat_template": TEMPLATE,
    }


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How the tokenizer.json of GPT-2, SmolLM2 and Llama 3 cut text.
KINDS = {
    "gpt-2": [GPT2],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES],
}


@pytest.mark.parametrize("pre", KINDS)
def test_byte_level_tokenizers_keep_their_ids(tmp_path, pre):
    original = trained(KINDS[pre])
    path = write_gguf(tmp_path / "x.gguf", metadata_of(original, pre))
    tokenizer = load(tokenizer_files(path), tmp_path)
    assert len(tokenizer) == original.get_vocab_size()
    for text in corpus():
        ids = original.encode(text).ids
        assert tokenizer(text).input_ids == ids, text
        assert (
            tokenizer.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False) == text
        )
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [0, 1, 2]
    assert tokenizer("<|im_start|>").input_ids == [1] and tokenizer("<|im_end|>").input_ids == [2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_end|>",
    )
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi 1"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi 1<|im_end|>\n"


def test_equal_to_transformers_own_reading(tmp_path):
    """transformers reads the same GGUF; for 'smollm' it forgets to cut digits, so those texts are its own."""
    from transformers import AutoTokenizer

    for pre in ("gpt-2", "llama-bpe", "smollm"):
        folder = tmp_path / pre
        folder.mkdir()
        path = write_gguf(folder / "x.gguf", metadata_of(trained(KINDS[pre]), pre))
        ours, theirs = load(tokenizer_files(path), folder), AutoTokenizer.from_pretrained(folder, gguf_file="x.gguf")
        texts = [text for text in corpus() if pre != "smollm" or not any(character.isnumeric() for character in text)]
        assert len(texts) > 20
        for text in texts:
            assert ours(text).input_ids == theirs(text).input_ids, (pre, text)
        assert ours.chat_template == theirs.chat_template


def test_the_begin_token_is_added_when_the_file_says_so(tmp_path):
    metadata = metadata_of(trained(KINDS["gpt-2"]), "gpt-2")
    path = write_gguf(tmp_path / "x.gguf", {**metadata, "add_bos_token": True, "add_eos_token": True})
    tokenizer = load(tokenizer_files(path), tmp_path)
    plain = tokenizer("the fox", add_special_tokens=False).input_ids
    assert tokenizer("the fox").input_ids == [1, *plain, 2]


def sentencepiece_metadata(model: bytes) -> tuple[dict, object]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())
    kinds = [
        6 if processor.is_byte(i) else 3 if processor.is_control(i) else 2 if processor.is_unknown(i) else 1
        for i in ids
    ]
    return {
        "tokenizer_model": "llama",
        "token_list": [processor.id_to_piece(i) for i in ids],
        "token_types": kinds,
        "token_scores": [processor.get_score(i) for i in ids],
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unk_token_id": processor.unk_id(),
    }, processor


def test_sentencepiece_vocabularies_keep_their_ids(tmp_path):
    """A model trained here; sentencepiece itself is the oracle."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus(1) * 3),
        model_writer=model,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    check_sentencepiece(tmp_path, model.getvalue())


def test_mistrals_sentencepiece_model(tmp_path):
    """A real model of 32000 pieces, of the same kind as Llama 2's."""
    check_sentencepiece(
        tmp_path, (importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1").read_bytes()
    )


def check_sentencepiece(tmp_path, model: bytes) -> None:
    metadata, processor = sentencepiece_metadata(model)
    tokenizer = load(tokenizer_files(write_gguf(tmp_path / "x.gguf", metadata)), tmp_path)
    assert len(tokenizer) == processor.get_piece_size()
    for text in corpus():
        if "<|" in text or not text or "\x00" in text:
            continue
        ids = processor.encode(text)
        assert tokenizer(text).input_ids == [processor.bos_id(), *ids], text
        assert tokenizer.decode(ids) == processor.decode(ids) == text, text


def test_faults_are_named(tmp_path, capsys):
    good = metadata_of(trained(KINDS["gpt-2"]), "gpt-2")
    cases = {
        "vocabulary of kind 'bert'": {**good, "tokenizer_model": "bert"},
        "splits words as 'gpt-9'": {**good, "tokenizer_pre": "gpt-9"},
        "vocabulary is damaged: a token occurs twice": {**good, "token_list": good["token_list"][:-1] + ["!"]},
        "lacks scores or types": {**good, "tokenizer_model": "llama"},
        "lacks merges": {name: value for name, value in good.items() if name != "token_merges"},
    }
    for number, (message, metadata) in enumerate(cases.items()):
        path = write_gguf(tmp_path / f"{number}.gguf", metadata)
        with pytest.raises(InputError, match=f"{number}.gguf: .*{message}"):
            tokenizer_files(path)
    assert tokenizer_files(write_gguf(tmp_path / "none.gguf", {})) == {}
    assert "none.gguf: holds no vocabulary" in capsys.readouterr().err
