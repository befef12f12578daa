"""Where the assistant's answers lie in the text of a conversation.

An answer begins where the template's opening of an answer ends: at the first character that the model has to
write when it is asked (for vicuna_v1.1 the space after "ASSISTANT:"). It ends with its end mark: the first special
token after its words, else the template's stop string, else whatever visible text the template puts before the
next turn. An answer without words is not supervised. A chat template with `{% generation %}` marks its answers itself.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from msft.data.formats import BadRow, Conversation


class Located(NamedTuple):
    """The text of a conversation and the characters [start, end) of its answers, end marks included.

    `end_mark` is the last answer's, "" when the template has none; `departures` counts answers that do not
    follow the template's opening (templates that write earlier answers differently).
    """

    text: str
    answers: list[tuple[int, int]]
    end_mark: str
    departures: int


class AnswerFinder:
    """Finds answers in what one template makes of conversations, for one tokenizer's special tokens."""

    def __init__(self, template, special_tokens: Iterable[str]):
        self._template = template
        words = sorted(special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, words)) or r"(?!)")

    def locate(self, conversation: Conversation) -> Located:
        """Render a conversation and find its answers; raises BadRow when the template refuses or hides them."""
        if self._template.marks_answers:
            return self._by_marks(conversation)
        return self.by_openings(conversation)

    def by_openings(self, conversation: Conversation) -> Located:
        """Find the answers by what the template writes before and after each of them."""
        turns = conversation.turns
        text = self._template.render(conversation.system, turns)
        answers, end_mark, departures, position = [], "", 0, 0
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            start, follows = self._start(text, conversation, number, position)
            limit = self._limit(text, conversation, number)
            position, end_mark = self._end(text, turn.text, start, limit)
            if turn.text.strip():
                answers.append((start, position))
                departures += not follows
        return Located(text, answers, end_mark, departures)

    def special_in(self, text: str) -> bool:
        """Whether a special token is written in `text`."""
        return self._special.search(text) is not None

    def _by_marks(self, conversation: Conversation) -> Located:
        text, marks = self._template.render_marked(conversation.system, conversation.turns)
        spoken = [bool(turn.text.strip()) for turn in conversation.turns if turn.role == "assistant"]
        if len(marks) == len(spoken):
            marks = [mark for mark, words in zip(marks, spoken, strict=True) if words]
        ends = [match.group() for match in self._special.finditer(text, *marks[-1])] if marks else []
        return Located(text, marks, ends[-1] if ends else "", 0)

    def _start(self, text: str, conversation: Conversation, number: int, position: int) -> tuple[int, bool]:
        """Return where an answer begins, and whether it follows the template's opening of an answer."""
        system, turns = conversation.system, conversation.turns
        opening = self._template.render(system, turns[:number], prompt=True)
        if text.startswith(opening):
            return len(opening), True
        words = turns[number].text.strip()
        before = self._template.render(system, turns[:number]) if number else ""
        found = text.find(words, len(before) if text.startswith(before) else position)
        if found < 0:
            raise BadRow(f"the template rewrites turn {number + 1}, so that its words cannot be found")
        return found, False

    def _limit(self, text: str, conversation: Conversation, number: int) -> int | None:
        """Return where the next turn begins, None when the template does not tell."""
        turns = conversation.turns
        if number + 1 == len(turns):
            return len(text)
        so_far = self._template.render(conversation.system, turns[: number + 1])
        return len(so_far) if text.startswith(so_far) else None

    def _end(self, text: str, words: str, start: int, limit: int | None) -> tuple[int, str]:
        """Return where an answer ends, and its end mark."""
        words = words.strip()
        found = text.find(words, start, limit)
        if found < 0:
            return self._end_of_rewritten(text, start, limit)
        after = found + len(words)
        special = self._special.search(text, after, len(text) if limit is None else limit)
        if special:
            return special.end(), special.group()
        if limit is None:
            return after, ""
        tail = text[after:limit]
        for stop in self._template.stop_strings:
            if stop in tail:
                return after + tail.index(stop) + len(stop), stop
        return after + len(tail.rstrip()), tail.strip()

    def _end_of_rewritten(self, text: str, start: int, limit: int | None) -> tuple[int, str]:
        """The template changed the words: the answer is all that comes before the next turn."""
        if limit is None:
            raise BadRow("the template rewrites an answer, so that its end cannot be found")
        marks = list(self._special.finditer(text, start, limit))
        if marks and not text[marks[-1].end() : limit].strip():
            return marks[-1].end(), marks[-1].group()
        return start + len(text[start:limit].rstrip()), ""
