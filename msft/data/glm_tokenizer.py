"""ChatGLM-6B's vocabulary file, ice_text.model: a sentencepiece model under a numbering and a spelling of its own.

As the release's tokenizer reads it: line feeds, tabs and runs of spaces are words of their own, and where its config
says so, `num_image_tokens` numbers come before those of the pieces (20000 in the first release, 0 since).
"""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msft.data.sentencepiece_tokenizer import SentencePieceTokenizer
from msft.data.tokenizer_files import ICE_TEXT, copy_files, named_tokens, read_config, read_json
from msft.data.tokenizers import Encoding
from msft.errors import InputError

NAMED = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "[MASK]",
    "gmask_token": "[gMASK]",
}
LONGEST_BLANK = 80
_SPELLED = re.compile(f"\n|\t| {{2,{LONGEST_BLANK}}}")
_READ = re.compile(r"<n>|<\|tab\|>|<\|blank_(\d+)\|>")


class ChatGLMTokenizer:
    """`tokenizers.Tokenizer` of ChatGLM-6B: [gMASK] <sop> stand between a question and its answer."""

    prefix_ids: tuple[int, ...] = ()

    def __init__(self, model: Path, folder: Path | None = None):
        config = read_config(folder) if folder else {}
        self.named_tokens = NAMED | named_tokens(config)
        self._pieces = SentencePieceTokenizer(model, folder, tuple(self.named_tokens.values()))
        self._file, self._folder = model, folder
        self._before = _whole(config.get("num_image_tokens", 0), model)
        self.vocab_size = self._pieces.vocab_size + self._before
        self.special_tokens = {word: index + self._before for word, index in self._pieces.special_tokens.items()}
        self.chat_templates = self._pieces.chat_templates
        self.bos_id, self.eos_id, self.pad_id, gmask = (
            self._id_of(name) for name in ("bos_token", "eos_token", "pad_token", "gmask_token")
        )
        self.answer_ids = self.suffix_ids = gmask, self.bos_id
        if folder:
            self._check_numbers(read_json(folder / "config.json"))

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize texts, without [gMASK] and <sop>."""
        spelled = [_spelled(text) for text in texts]
        encodings = self._pieces.encode([each.text for each in spelled])
        return [
            Encoding((ids + self._before).astype(np.int32), *_own(text, starts, ends))
            for text, (ids, starts, ends) in zip(spelled, encodings, strict=True)
        ]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of token ids; special tokens are left out or written as they are."""
        special = set(self.special_tokens.values()) if skip_special else ()
        pieces = [int(token) - self._before for token in ids if token >= self._before and token not in special]
        return _READ.sub(_blank, self._pieces.decode(pieces, skip_special))

    def save_copy(self, folder: str | os.PathLike) -> None:
        """Copy the vocabulary file and its folder's tokenizer files into `folder`."""
        if self._folder:
            copy_files(self._folder, Path(folder))
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._file, Path(folder) / ICE_TEXT)

    def _id_of(self, name: str) -> int:
        word = self.named_tokens[name]
        if word not in self.special_tokens:
            raise InputError(f"{self._file}: has no {word} ({name}), so it is not ChatGLM-6B's vocabulary")
        return self.special_tokens[word]

    def _check_numbers(self, config: dict) -> None:
        """Raise InputError where the model beside it numbers tokens in another way."""
        meant = config.get("gmask_token_id")
        if type(meant) is int and meant != self.answer_ids[0]:
            raise InputError(
                f"{self._file}: [gMASK] is token {self.answer_ids[0]} with num_image_tokens {self._before} "
                f"(tokenizer_config.json), but config.json says gmask_token_id {meant}; "
                f"num_image_tokens {meant - self.answer_ids[0] + self._before} would fit"
            )


def _whole(number, where: Path) -> int:
    if type(number) is not int or not 0 <= number < 2**24:
        raise InputError(
            f"{where}: num_image_tokens of tokenizer_config.json must be a whole number, not {number!r:.80}"
        )
    return number


class _Spelled(NamedTuple):
    """A text as the pieces spell it, and for each of its characters where in the own text it begins and ends.

    One more is for what stands for no character at the end.
    """

    text: str
    first: np.ndarray
    last: np.ndarray


def _own(spelled: _Spelled, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens lie in the own text."""
    first = spelled.first[starts]
    return first, np.where(ends > starts, spelled.last[ends - 1], first)


def _spelled(text: str) -> _Spelled:
    parts, first, last, at = [], [], [], 0
    for found in _SPELLED.finditer(text):
        plain, word = text[at : found.start()], _word(found.group())
        parts += [plain, word]
        first += [*range(at, found.start()), *[found.start()] * len(word)]
        last += [*range(at + 1, found.start() + 1), *[found.end()] * len(word)]
        at = found.end()
    parts.append(text[at:])
    first += range(at, len(text) + 1)
    last += [*range(at + 1, len(text) + 1), len(text)]
    return _Spelled("".join(parts), np.array(first, np.int64), np.array(last, np.int64))


def _word(found: str) -> str:
    return {"\n": "<n>", "\t": "<|tab|>"}.get(found) or f"<|blank_{len(found)}|>"


def _blank(found: re.Match) -> str:
    """The white space that a word stands for; blanks longer than any are text."""
    if found[1] is None:
        return "\n" if found[0] == "<n>" else "\t"
    return " " * int(found[1]) if 1 < int(found[1]) <= LONGEST_BLANK else found[0]
