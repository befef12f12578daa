"""A sentencepiece `.model` file as a tokenizer; what sentencepiece returns is what counts."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from msft.data import offsets, sentencepiece_words
from msft.data.sentencepiece_words import SPACE
from msft.data.tokenizer_files import chat_templates, copy_files, extra_tokens, named_tokens, read_config
from msft.data.tokenizers import Encoding
from msft.errors import InputError

# Letters that every normalisation rule of sentencepiece except 'identity' changes.
_NORMALISED = "\uff21\u2460\ufb01e\u0301"


class SentencePieceTokenizer:
    """A sentencepiece model, with tokenizer_config.json and chat template when it lies in a Hugging Face folder.

    Control tokens (`<s>`, `</s>`) and `<unk>` written in a text are read as tokens, and each part between them is
    tokenized alone, with sentencepiece's leading space: what transformers' and MindFormers' LlamaTokenizer do.
    The begin token is put before a text unless the model has none or the config says `add_bos_token: false`. `specials`
    are more words of the model that are read as tokens.
    """

    answer_ids: tuple[int, ...] = ()

    def __init__(self, model: Path, folder: Path | None = None, specials: Sequence[str] = ()):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(model))
            self.vocab_size = self._model.get_piece_size()
            pieces = [self._model.id_to_piece(index) for index in range(self.vocab_size)]
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{model}: not a sentencepiece model, or a damaged one ({reason:.300})") from None
        self._file, self._folder = model, folder
        config = read_config(folder) if folder else {}
        self.special_tokens = self._specials(pieces, [*named_tokens(config).values(), *extra_tokens(config), *specials])
        self.named_tokens = self._own_names(pieces) | named_tokens(config)
        self.chat_templates = chat_templates(folder, config) if folder else {}
        self.bos_id = self.special_tokens.get(self.named_tokens.get("bos_token"))
        self.eos_id = self.special_tokens.get(self.named_tokens.get("eos_token"))
        self.pad_id = self._pad_id()
        self.prefix_ids = (self.bos_id,) if self.bos_id is not None and config.get("add_bos_token", True) else ()
        self.suffix_ids = (self.eos_id,) if self.eos_id is not None and config.get("add_eos_token", False) else ()
        words = sorted(self.special_tokens, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, words)) + ")").split if words else lambda text: [text]
        self._lengths = self._piece_lengths(pieces)
        self._lead = int(self._lengths[self._model.encode("a")].sum()) - 1
        self._plain = self._model.decode(self._model.encode(_NORMALISED)) == _NORMALISED
        self._words = sentencepiece_words.words_of(self._model, pieces) if self._plain else None

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize texts, without begin and end tokens."""
        parts = [self._split(text) for text in texts]
        plain = [part for of_text in parts for part in of_text[::2] if part]
        if self._words is None:
            ids, stops = offsets.in_a_row(self._model.encode(plain, num_threads=1))
        else:
            ids, stops = self._words.encode(plain)
        spans = zip(plain, offsets.spans(ids, stops, self._lengths, plain, self._lead), strict=True)
        found = iter([self._spanned(part, each) for part, each in spans])
        return [self._assemble(of_text, found) for of_text in parts]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of token ids; special tokens are left out or written as they are."""
        if skip_special:
            unknown = self._model.unk_id()
            return self._model.decode([int(token) for token in ids if token != unknown])
        words = {token: word for word, token in self.special_tokens.items()}
        runs = groupby(map(int, ids), key=words.get)
        return "".join(word * len(list(run)) if word else self._model.decode(list(run)) for word, run in runs)

    def save_copy(self, folder: str | os.PathLike) -> None:
        """Copy the model file (as tokenizer.model) and its folder's tokenizer files into `folder`."""
        if self._folder:
            copy_files(self._folder, Path(folder))
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._file, Path(folder) / "tokenizer.model")

    def _specials(self, pieces: list[str], wanted: list[str]) -> dict[str, int]:
        model = self._model
        own = [index for index in range(len(pieces)) if model.is_control(index) or model.is_unknown(index)]
        specials = {pieces[index]: index for index in own}
        for word in wanted:
            index = model.piece_to_id(word)
            if index != model.unk_id():
                specials[word] = index
        return specials

    def _own_names(self, pieces: list[str]) -> dict[str, str]:
        model = self._model
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        return {name: pieces[index] for name, index in (ids | {"pad_token": model.pad_id()}).items() if index >= 0}

    def _pad_id(self) -> int:
        for name in ("pad_token", "unk_token", "eos_token"):
            if self.named_tokens.get(name) in self.special_tokens:
                return self.special_tokens[self.named_tokens[name]]
        raise InputError(f"{self._file}: no padding, unknown or end token to pad with")

    def _piece_lengths(self, pieces: list[str]) -> np.ndarray:
        model = self._model
        sizes = [len(piece.replace(SPACE, " ").encode()) for piece in pieces]
        lengths = np.array([1 if model.is_byte(index) else size for index, size in enumerate(sizes)], np.int64)
        # The text behind an unknown token may have any length: this one makes the sum come out wrong.
        lengths[model.unk_id()] = 1 << 40
        return lengths

    def _spanned(self, text: str, found: offsets.Span | None) -> Encoding:
        if found and (self._plain or text.isascii()):
            return Encoding(*found)
        mapping = self._model.encode(text, out_type="offset_mapping")
        pairs = np.array(mapping["offsets"], np.int64).reshape(-1, 2)
        return Encoding(np.array(mapping["ids"], np.int32), pairs[:, 0], pairs[:, 1])

    def _assemble(self, parts: list[str], found: Iterator[Encoding]) -> Encoding:
        pieces, position = [], 0
        for number, part in enumerate(parts):
            if number % 2:
                pieces.append(([self.special_tokens[part]], [position], [position + len(part)]))
            elif part:
                ids, starts, ends = next(found)
                pieces.append((ids, starts + position, ends + position))
            position += len(part)
        if not pieces:
            return Encoding(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
        ids, starts, ends = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return Encoding(ids.astype(np.int32), starts, ends)
