"""A Hugging Face tokenizer folder read with the `tokenizers` library, without transformers."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from msft.data import hf_words, offsets
from msft.data.tokenizer_files import (
    TOKEN_FLAGS,
    chat_templates,
    copy_files,
    extra_tokens,
    named_tokens,
    read_config,
    read_json,
    token_text,
)
from msft.data.tokenizers import Encoding
from msft.errors import InputError

# Tables are made with an entry for each number.
LARGEST_ID = 1 << 24
LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


class HFTokenizer:
    """tokenizer.json with tokenizer_config.json; gives the ids that transformers 5's AutoTokenizer gives."""

    answer_ids: tuple[int, ...] = ()

    def __init__(self, folder: Path):
        self._folder = folder
        config = read_config(folder)
        llama = _is_llama(folder, config)
        self.named_tokens = (LLAMA_TOKENS if llama else {}) | named_tokens(config)
        with self._library():
            self._tokenizer = _load(folder, config, llama)
            _add_missing(self._tokenizer, config, [*self.named_tokens.values(), *extra_tokens(config)])
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if largest > LARGEST_ID:
            raise InputError(f"{folder / 'tokenizer.json'}: a token has the number {largest}, beyond any vocabulary")
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in added.items() if token.special}
        self.chat_templates = chat_templates(folder, config)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self.pad_id = self._pad_id()
        with self._library():
            self.prefix_ids, self.suffix_ids = _surroundings(self._tokenizer)
        # Post-processors trim spaces from offsets; what they add is kept above.
        self._tokenizer.post_processor = None
        self._lengths = _byte_lengths(self._tokenizer)
        self._plain = self._tokenizer.normalizer is None
        self._words = None if self._lengths is None else hf_words.words_of(self._tokenizer)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize texts, without begin and end tokens."""
        with self._library():
            if self._lengths is None:
                return [_with_offsets(encoding) for encoding in self._tokenizer.encode_batch(list(texts))]
            if self._words is None:
                encodings = self._tokenizer.encode_batch_fast(list(texts))
                ids, stops = offsets.in_a_row([encoding.ids for encoding in encodings])
            else:
                ids, stops = self._words.encode(texts)
            found = offsets.spans(ids, stops, self._lengths, texts)
            return [self._spanned(text, each) for text, each in zip(texts, found, strict=True)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of token ids."""
        with self._library():
            return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=skip_special)

    def save_copy(self, folder: str | os.PathLike) -> None:
        """Copy the tokenizer's files into `folder`."""
        copy_files(self._folder, Path(folder))

    @contextlib.contextmanager
    def _library(self):
        """Turn what the tokenizers library raises into one InputError: bare Exceptions, and panics, which are none."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self._folder / 'tokenizer.json'}: not a tokenizer that can be used ({reason:.300})"
            ) from None

    def _id_of(self, name: str) -> int | None:
        text = self.named_tokens.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    def _pad_id(self) -> int:
        found = [index for name in ("pad_token", "unk_token", "eos_token") if (index := self._id_of(name)) is not None]
        if not found:
            raise InputError(f"{self._folder}: no padding, unknown or end token in tokenizer_config.json to pad with")
        return found[0]

    def _spanned(self, text: str, found: offsets.Span | None) -> Encoding:
        if found is None or not (self._plain or text.isascii()):
            return _with_offsets(self._tokenizer.encode(text))
        return Encoding(*found)


def _with_offsets(encoding) -> Encoding:
    pairs = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return Encoding(np.array(encoding.ids, np.int32), pairs[:, 0], pairs[:, 1])


def _is_llama(folder: Path, config: dict) -> bool:
    """Whether transformers 5 would take its LlamaTokenizer class, which builds the pipeline anew."""
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if name != "LlamaTokenizer" or read_json(folder / "config.json").get("model_type", "llama") != "llama":
        return False
    return b'"ByteLevel"' not in (folder / "tokenizer.json").read_bytes()


def _load(folder: Path, config: dict, llama: bool):
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if llama:
        space = config.get("add_prefix_space") is not False
        scheme = ("always" if config.get("legacy", False) else "first") if space else "never"
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * space)
    return tokenizer


def _add_missing(tokenizer, config: dict, specials: list[str]) -> None:
    """Add the config's tokens that tokenizer.json does not know as added tokens."""
    from tokenizers import AddedToken

    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    entries = sorted((int(index), entry) for index, entry in (config.get("added_tokens_decoder") or {}).items())
    for _, entry in entries:
        text = token_text(entry)
        if text is not None and text not in known:
            token = AddedToken(text, **{flag: entry[flag] for flag in TOKEN_FLAGS if flag in entry})
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
            known.add(text)
    missing = [AddedToken(text, special=True, normalized=False) for text in specials if text not in known]
    tokenizer.add_special_tokens(missing)


def _surroundings(tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor puts before and after a text."""
    bare, full = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def _byte_lengths(tokenizer) -> np.ndarray | None:
    """Return each piece's size in bytes for byte-level BPE without an added space, None for other kinds."""
    if type(tokenizer.model).__name__ != "BPE" or tokenizer.pre_tokenizer is None:
        return None
    state = tokenizer.pre_tokenizer.__getstate__()
    if b'"ByteLevel"' not in state or b'"add_prefix_space":true' in state.replace(b" ", b""):
        return None
    lengths = np.zeros(max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1, np.int64)
    for piece, index in tokenizer.get_vocab(with_added_tokens=False).items():
        lengths[index] = len(piece)
    for index, token in tokenizer.get_added_tokens_decoder().items():
        lengths[index] = len(token.content.encode())
    return lengths
