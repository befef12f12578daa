"""Answers as text, as an engine makes their tokens; stop texts end a row as soon as they appear."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from msft.backend.contract import Engine, Sampling
from msft.data.text_stream import TextStream
from msft.data.tokenizers import Tokenizer


class Answerer:
    """Generates with one engine, tokenizer, sampling and set of stop texts."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, sampling: Sampling, stops: Sequence[str] = ()):
        self._engine = engine
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._stops = tuple(stops)
        self._answered = sampling.first_row

    def answer(self, prompts: Sequence[Sequence[int]], on_text: Callable[[str], None] | None = None) -> list[str]:
        """Return the answer to each prompt (token ids), cut before a stop text.

        `on_text` gets the pieces of the first prompt's answer as they become certain. What is drawn depends on
        how many prompts were answered before, not on how they are dealt to calls.
        """
        rows = [_Row(TextStream(self._tokenizer), self._stops) for _ in prompts]

        def on_token(row: int, token: int) -> bool:
            piece = rows[row].push(token)
            if on_text and row == 0:
                on_text(piece)
            return rows[row].stopped

        self._engine.generate(prompts, replace(self._sampling, first_row=self._answered), on_token)
        self._answered += len(prompts)
        endings = [row.flush() for row in rows]
        if on_text:
            on_text(endings[0])
        return [row.text for row in rows]


class _Row:
    """One growing answer; holds back text that may turn out to begin a stop text."""

    def __init__(self, stream: TextStream, stops: tuple[str, ...]):
        self._stream = stream
        self._stops = stops
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._take(self._stream.push(token), final=False)

    def flush(self) -> str:
        return "" if self.stopped else self._take(self._stream.flush(), final=True)

    def _take(self, new: str, final: bool) -> str:
        pending = self._held + new
        found = [pending.index(stop) for stop in self._stops if stop in pending]
        self.stopped = bool(found)
        certain = min(found) if found else len(pending) - (0 if final else self._overlap(pending))
        self._held = "" if found else pending[certain:]
        self.text += pending[:certain]
        return pending[:certain]

    def _overlap(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop text."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
