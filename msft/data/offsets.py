"""Where tokens lie in texts, from the lengths of their pieces: far cheaper than asking the tokenizer for offsets."""

from collections.abc import Sequence

import numpy as np


def spans(ids: np.ndarray, lengths: np.ndarray, text: str, lead: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the characters [start, end) of each token, or None when the pieces do not spell the text.

    `lengths` [vocabulary] are the pieces' sizes in UTF-8 bytes; `lead` bytes in front are the tokenizer's own
    (sentencepiece's first space). A token that is a part of a character stands for the whole character.
    """
    ends = np.cumsum(lengths[ids]) - lead
    starts = np.concatenate(([-lead], ends[:-1])).clip(min=0) if len(ids) else ends
    return _in_characters(starts, ends, text, lead)


def spans_of_each(
    ids: np.ndarray, stops: np.ndarray, lengths: np.ndarray, texts: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray] | None]:
    """Return (ids, starts, ends) of each text, None as in `spans`.

    `ids` are those of all texts in a row, and `stops` where those of each end.
    """
    sizes = lengths[ids]
    counts = np.diff(stops, prepend=0)
    ends = np.cumsum(sizes)
    before = np.concatenate(([0], ends))[stops - counts]
    ends -= np.repeat(before, counts)
    starts, found, first = ends - sizes, [], 0
    for text, stop in zip(texts, stops.tolist(), strict=True):
        pair = _in_characters(starts[first:stop], ends[first:stop], text, 0)
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


def characters(text: str) -> np.ndarray:
    """Return the index of the character that each UTF-8 byte of `text` belongs to, and one more for the end."""
    data = np.frombuffer(text.encode(), np.uint8)
    return np.append(np.cumsum((data & 0xC0) != 0x80) - 1, len(text))
