"""Where tokens lie in a text, from the lengths of their pieces: far cheaper than asking the tokenizer for offsets."""

import numpy as np


def spans(ids: np.ndarray, lengths: np.ndarray, text: str, lead: int = 0) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the characters [start, end) of each token, or None when the pieces do not spell the text.

    `lengths` [vocabulary] are the pieces' sizes in UTF-8 bytes; `lead` bytes in front are the tokenizer's own
    (sentencepiece's first space). A token that is a part of a character stands for the whole character.
    """
    ends = np.cumsum(lengths[ids]) - lead
    size = len(text) if text.isascii() else len(text.encode())
    if (int(ends[-1]) if len(ids) else -lead) != size:
        return None
    starts = np.concatenate(([-lead], ends[:-1])).clip(min=0) if len(ids) else ends
    if size == len(text):
        return starts, ends
    character = characters(text)
    return character[starts], np.where(ends > starts, character[ends - 1] + 1, character[starts])


def characters(text: str) -> np.ndarray:
    """Return the index of the character that each UTF-8 byte of `text` belongs to, and one more for the end."""
    data = np.frombuffer(text.encode(), np.uint8)
    return np.append(np.cumsum((data & 0xC0) != 0x80) - 1, len(text))
