"""Tokenizers: one small interface over a sentencepiece model and a Hugging Face tokenizer folder.

transformers is not used. A `.model` file means what sentencepiece makes of it; a folder with a `tokenizer.json`
means what transformers 5's AutoTokenizer makes of it.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from msft.data.tokenizer_files import ICE_TEXT
from msft.errors import InputError


class Encoding(NamedTuple):
    """The tokens of one text: `ids` (int32 [n]) and the characters [start, end) that each stands for (int64 [n]).

    Special tokens written in the text are read as such. Begin and end tokens are not added. A token of no
    characters (the space that sentencepiece puts before a text) has start == end.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer.

    `special_tokens` maps the text of each special token to its id; `named_tokens` holds 'bos_token', 'eos_token'
    ... as texts. `pad_id` is the padding token, else the unknown token (0, as MindFormers pads), else the end token.
    `prefix_ids` and `suffix_ids` are what the tokenizer itself puts around a text, usually the begin token and nothing;
    `answer_ids` what it puts between a question and its answer, usually nothing: where it does, a model reads what is
    before them in both directions, so that one answer of a conversation is learned.
    `chat_templates` maps names to Jinja sources; the usual one is called 'default'.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    special_tokens: Mapping[str, int]
    named_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize texts, without begin and end tokens."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of token ids."""

    def save_copy(self, folder: str | os.PathLike) -> None:
        """Copy the tokenizer's files into `folder`, to lie beside an exported model."""


def open_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Open a sentencepiece model file or a folder with tokenizer.json, tokenizer.model or ice_text.model.

    Raises InputError when there is no tokenizer or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"tokenizer: no file or folder {str(path)!r}")
    if path.name == "tokenizer.json":
        path = path.parent
    if path.is_file():
        return _chatglm(path, None) if path.name == ICE_TEXT else _sentencepiece(path, None)
    if (path / "tokenizer.json").is_file():
        from msft.data.hf_tokenizer import HFTokenizer

        return HFTokenizer(path)
    for name in ("tokenizer.model", "spiece.model"):
        if (path / name).is_file():
            return _sentencepiece(path / name, path)
    if (path / ICE_TEXT).is_file():
        return _chatglm(path / ICE_TEXT, path)
    hint = ""
    if (path / "vocab.json").is_file():
        hint = " (it has vocab.json: AutoTokenizer.from_pretrained(...).save_pretrained(...) writes tokenizer.json)"
    raise InputError(f"tokenizer: folder {str(path)!r} has neither tokenizer.json nor tokenizer.model{hint}")


def _chatglm(model: Path, folder: Path | None) -> Tokenizer:
    from msft.data.glm_tokenizer import ChatGLMTokenizer

    return ChatGLMTokenizer(model, folder)


def _sentencepiece(model: Path, folder: Path | None) -> Tokenizer:
    from msft.data.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(model, folder)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenize a plain text with the tokenizer's own begin and end tokens, as transformers' `tokenizer(text)` does."""
    return [*tokenizer.prefix_ids, *tokenizer.encode([text])[0].ids.tolist(), *tokenizer.suffix_ids]
