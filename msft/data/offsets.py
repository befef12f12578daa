"""Where tokens lie in texts, from the lengths of their pieces: far cheaper than asking the tokenizer for offsets."""

from collections.abc import Sequence
from itertools import chain

import numpy as np

Span = tuple[np.ndarray, np.ndarray, np.ndarray]


def spans(
    ids: np.ndarray, stops: np.ndarray, lengths: np.ndarray, texts: Sequence[str], lead: int = 0
) -> list[Span | None]:
    """Return (ids, starts, ends) of each text, in characters, or None where the pieces do not spell the text.

    `ids` are those of all texts in a row, and `stops` where those of each end. `lengths` [vocabulary] are the pieces'
    sizes in UTF-8 bytes; `lead` bytes before each text are the tokenizer's own (sentencepiece's first space). A token
    that is a part of a character stands for the whole character.
    """
    sizes = lengths[ids]
    counts = np.diff(stops, prepend=0)
    ends = np.cumsum(sizes)
    before = np.concatenate(([0], ends))[stops - counts]
    ends -= np.repeat(before + lead, counts)
    starts, found, first = (ends - sizes).clip(min=0), [], 0
    for text, stop in zip(texts, stops.tolist(), strict=True):
        pair = _in_characters(starts[first:stop], ends[first:stop], text, lead)
        found.append(pair and (ids[first:stop], *pair))
        first = stop
    return found


def _in_characters(starts: np.ndarray, ends: np.ndarray, text: str, lead: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return bytes [start, end) of a text as characters, None when they are not those of the whole text."""
    size = len(text) if text.isascii() else len(text.encode())
    if (int(ends[-1]) if len(ends) else -lead) != size:
        return None
    if size == len(text):
        return starts, ends
    character = characters(text)
    return character[starts], np.where(ends > starts, character[ends - 1] + 1, character[starts])


def in_a_row(ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of several texts in a row, int32, and where those of each end, int64."""
    stops = np.cumsum([len(each) for each in ids], dtype=np.int64)
    return np.fromiter(chain.from_iterable(ids), np.int32), stops


def characters(text: str) -> np.ndarray:
    """Return the index of the character that each UTF-8 byte of `text` belongs to, and one more for the end."""
    data = np.frombuffer(text.encode(), np.uint8)
    return np.append(np.cumsum((data & 0xC0) != 0x80) - 1, len(text))
