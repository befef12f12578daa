"""Tokens of texts from the tokens of their words: a word that comes again is not tokenized again.

A cut lies before every single space that stands between two characters that are none. Which tokenizers never put
a token across such a cut, and decide on each side as if the other were not there, is for them to say: then the
tokens of a text are those of its words in a row.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

KEPT_WORDS = 1 << 17
LONGEST_KEPT = 64  # characters

# Python's white space holds all of Unicode's, and so of the tokenizers' own.
_cut = re.compile(r"(?<=\S)(?= \S)").split


class Words:
    """Tokenizes texts by their words, and keeps the tokens of up to `KEPT_WORDS` words (some 30 MB)."""

    def __init__(
        self,
        encode: Callable[[list[str]], Sequence[Sequence[int]]],
        special_tokens: Mapping[str, int],
        lead: str = "",
    ):
        """`encode` tokenizes words; `lead` is what the tokenizer puts before a text and before what follows a token.

        `special_tokens` are read as tokens wherever they are written, the longest first.
        """
        self._encode, self._lead = encode, lead
        self._tokens = {"": b""} | {text: np.int32(index).tobytes() for text, index in special_tokens.items()}
        found = "|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True)))
        self._split = re.compile(f"({found or '(?!)'})").split
        self._room = KEPT_WORDS

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of all texts in a row, int32, and where the tokens of each text end, int64 [texts]."""
        words, ends = [""], [1]
        for text in texts:
            for number, part in enumerate(self._split(text)):
                if number % 2:
                    words.append(part)
                elif part:
                    words += _cut(self._lead + part)
            ends.append(len(words))
        tokens = self._look_up(words)
        sizes = np.fromiter(map(len, tokens), np.int64, len(tokens))
        return np.frombuffer(b"".join(tokens), np.int32), sizes.cumsum()[np.array(ends[1:], np.int64) - 1] // 4

    def _look_up(self, words: list[str]) -> list[bytes]:
        """Return the tokens of each word, int32 as bytes."""
        tokens = list(map(self._tokens.get, words))
        places = _places(tokens, None)
        unknown = list(dict.fromkeys(words[place] for place in places))
        ids = self._encode(unknown) if unknown else []
        new = {word: np.array(each, np.int32).tobytes() for word, each in zip(unknown, ids, strict=True)}
        for place in places:
            tokens[place] = new[words[place]]
        keep = [word for word in unknown if len(word) <= LONGEST_KEPT][: self._room]
        self._room -= len(keep)
        self._tokens.update((word, new[word]) for word in keep)
        return tokens


def _places(items: list, wanted) -> list[int]:
    """Return where `wanted` stands in a list, without a step of Python for every other item."""
    places, place = [], -1
    for _ in range(items.count(wanted)):
        place = items.index(wanted, place + 1)
        places.append(place)
    return places
