"""Text of a growing list of tokens, piece by piece, for answers that are printed as they are made."""

from msft.data.tokenizers import Tokenizer

UNFINISHED = "\ufffd"


class TextStream:
    """Turns new token ids into new text; holds back tokens that are part of a character until it is whole.

    The pieces joined equal `tokenizer.decode` of all ids. Decoding starts a few tokens back each time, because
    the text of a token depends on those before it, and so costs the same however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._ids: list[int] = []
        self._context, self._shown = 0, 0

    def push(self, *ids: int) -> str:
        """Take new tokens; return the text that is now certain."""
        self._ids.extend(ids)
        text = self._new_text()
        return "" if text.endswith(UNFINISHED) else self._show(text)

    def flush(self) -> str:
        """Return what is held back, unfinished characters included."""
        return self._show(self._new_text())

    def _show(self, text: str) -> str:
        # Tokens without text (special ones) are no context: a leading space would be lost after them.
        if text:
            self._context = self._shown
        self._shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)
