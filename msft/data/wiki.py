"""Running text -> blocks of tokens: WikiText files and Wikipedia dumps, as MindFormers' llama_preprocess cuts them."""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np

from msft.data.parallel import in_order
from msft.data.tokenizers import Tokenizer, open_tokenizer
from msft.errors import InputError

COLUMNS = {"input_ids": "int32"}
TEXTS_PER_TASK = 256

# WikiText's own tokenization undone, in MindFormers' order: a pattern and its replacement, or a pair of brackets.
_CLEANING = (
    (re.escape("s '"), "s'"),
    (r"/' [0-9]/", "/'[0-9]/"),
    (re.escape(" @-@ "), "-"),
    (re.escape(" @,@ "), ","),
    (re.escape(" @.@ "), "."),
    *((re.escape(f" {sign} "), f"{sign} ") for sign in ":;.!?,"),
    *(("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'")),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
_BRACKETS = "([{\"'"


def _tight(brackets: tuple[str, str], text: str) -> str:
    """Strip the spaces inside brackets or quotes.

    MindFormers' expressions, such as `\\(\\s*([^\\)]*?)\\s*\\)`, do the same, but take hours where one is left open.
    """
    opening, closing = brackets
    end = text.rfind(closing) + 1
    inner = re.compile(f"{re.escape(opening)}([^{re.escape(closing)}]*){re.escape(closing)}")
    return inner.sub(lambda match: f"{opening}{match[1].strip()}{closing}", text[:end]) + text[end:]


_CLEANERS = [
    partial(_tight, pair) if pair[0] in _BRACKETS else partial(re.compile(pair[0]).sub, pair[1]) for pair in _CLEANING
]


def clean(text: str) -> str:
    """Undo WikiText's tokenization: ' @-@ ', spaces before punctuation and within brackets and quotes."""
    for cleaner in _CLEANERS:
        text = cleaner(text)
    return text


def paragraphs(paths: list[str]) -> Iterator[str]:
    """Yield the cleaned paragraphs of WikiText files, headings left out; a file is in memory at a time."""
    for path in paths:
        for paragraph in clean(_read(path)).split("\n\n"):
            if paragraph and not paragraph.strip().startswith("="):
                yield paragraph


def lines(paths: list[str]) -> Iterator[str]:
    """Yield the lines, stripped and not empty, of the first column of parquet files."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError("wikipedia's parquet files are read with pyarrow: pip install 'pyarrow<22'") from None
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
            for batch in file.iter_batches(batch_size=TEXTS_PER_TASK, columns=file.schema_arrow.names[:1]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise InputError(
                            f"{path}: the first column ({file.schema_arrow.names[0]!r:.80}) must hold text"
                        )
                    yield from filter(None, map(str.strip, text.strip().split("\n")))
        except (OSError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: not a parquet file, or a damaged one ({reason:.300})") from None


def tokenize(
    texts: Iterable[str], model_file: str, whole: bool | tuple[bool, bool], workers: int
) -> Iterator[np.ndarray]:
    """Yield the tokens of texts in order, some texts at a time; `whole` texts get begin and end tokens, or one kind."""
    texts = iter(texts)
    tasks = iter(lambda: list(islice(texts, TEXTS_PER_TASK)), [])
    return in_order(_text_encoder, (model_file, whole), tasks, workers)


def _text_encoder(model_file: str, whole: bool | tuple[bool, bool]):
    tokenizer = open_tokenizer(model_file)
    wanted = whole if isinstance(whole, tuple) else (whole, whole)
    kept = [ids if want else () for ids, want in zip(borders(tokenizer), wanted, strict=True)]
    return partial(_encode_texts, tokenizer, *kept)


def borders(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids before and after a text in pretraining: the begin token if there is one, and the end token."""
    return tokenizer.prefix_ids, () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def _encode_texts(tokenizer: Tokenizer, before: tuple, after: tuple, texts: list[str]) -> np.ndarray:
    encodings = tokenizer.encode(texts)
    return np.concatenate([part for each in encodings for part in (before, each.ids, after)]).astype(np.int32)


def blocks(stream: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Cut a stream of tokens into blocks of `length`; the last yield is the rest, shorter than that."""
    rest = np.zeros(0, np.int32)
    for tokens in stream:
        rest = np.concatenate((rest, tokens))
        whole = len(rest) // length * length
        yield from rest[:whole].reshape(-1, length)
        rest = rest[whole:]
    yield rest


def repeated(stream: Iterable[np.ndarray], times: int) -> Iterator[np.ndarray]:
    """Yield a stream of tokens `times` over, tokenizing it once."""
    if times == 1:
        yield from stream
        return
    kept = list(stream)
    yield from chain.from_iterable(repeat(kept, times))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}") from None
