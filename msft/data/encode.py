"""Conversations -> token ids and labels; prompts -> token ids.

The rule for labels: the text of a conversation is tokenized as a whole, and **a token is supervised when any
character it stands for lies in an answer** (`msft.data.answers` says where those lie). A token that straddles the
border belongs to the answer, as in transformers' assistant mask; a token of no characters belongs to the character
it stands before.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from msft.backend.contract import IGNORE
from msft.data.answers import AnswerFinder, Located
from msft.data.formats import ROLES, BadRow, Conversation, Turn
from msft.data.templates import open_template
from msft.data.tokenizers import Encoding, Tokenizer
from msft.errors import InputError


class Example(NamedTuple):
    """One conversation in tokens: `ids` and `labels` int32 [n], labels[t] == ids[t] or -100 where not supervised.

    `remarks` are the names of what was left out or is unusual, for the report.
    """

    ids: np.ndarray
    labels: np.ndarray
    remarks: tuple[str, ...]


class Encoder:
    """Turns conversations into examples with one tokenizer and one template.

    With `last_answer_only` the answers before the last one are not supervised. Nor are they where the tokenizer puts
    `answer_ids` before an answer, which then is tokenized by itself.
    """

    def __init__(self, tokenizer: Tokenizer, template, last_answer_only: bool = False):
        self._tokenizer, self._template = tokenizer, template
        self._last_only = last_answer_only or bool(tokenizer.answer_ids)
        self._finder = AnswerFinder(template, tokenizer.special_tokens)
        self._prefix = tokenizer.prefix_ids if template.adds_prefix else ()

    def encode(self, conversations: Sequence[Conversation]) -> list[Example | BadRow]:
        """Return an example for each conversation, or the BadRow that says why there is none."""
        prepared = [self._prepare(conversation) for conversation in conversations]
        texts = [text for each in prepared if not isinstance(each, BadRow) for text in self._texts(each[0])]
        encodings = iter(self._tokenizer.encode(texts))
        if self._tokenizer.answer_ids:
            encodings = self._with_answer_ids(encodings, texts[::2])
        return [each if isinstance(each, BadRow) else self._example(*each, next(encodings)) for each in prepared]

    def parts(self, conversation: Conversation) -> list[Conversation]:
        """Return what of a conversation is an example of its own: all of it."""
        return [conversation]

    def cut(self, example: Example, length: int) -> Example:
        """Return the first `length` tokens of an example."""
        return example._replace(ids=example.ids[:length], labels=example.labels[:length])

    def _prepare(self, conversation: Conversation) -> tuple[Located, bool, tuple[str, ...]] | BadRow:
        try:
            conversation, remarks = trim(conversation)
            located = self._finder.locate(conversation)
        except BadRow as reason:
            return reason
        system, turns = conversation.system, conversation.turns
        if system and system.strip() not in located.text:
            remarks.append("system_left_out")
        if located.departures:
            remarks.append("answer_without_opening")
        if self._finder.special_in("\n".join(turn.text for turn in turns)):
            remarks.append("special_in_words")
        if not all(turn.text.strip() for turn in turns if turn.role == "assistant"):
            remarks.append("empty_answer")
        if self._tokenizer.answer_ids and len(located.answers) > 1:
            remarks.append("earlier_answers_read_only")
        unmarked = not located.end_mark and not self._template.marks_answers and bool(turns[-1].text.strip())
        if unmarked:
            located = located._replace(text=located.text[: located.answers[-1][1]])
        return located, unmarked and self._tokenizer.eos_id is not None, tuple(remarks)

    def _texts(self, located: Located) -> tuple[str, ...]:
        """What is tokenized by itself: all of a conversation, or what is before the last answer, and that."""
        if not self._tokenizer.answer_ids:
            return (located.text,)
        border = located.answers[-1][0] if located.answers else len(located.text)
        return located.text[:border], located.text[border:]

    def _with_answer_ids(self, encodings: Iterator[Encoding], questions: Sequence[str]) -> Iterator[Encoding]:
        """Each question and its answer as one encoding; what stands between them belongs to the question."""
        ids = np.array(self._tokenizer.answer_ids, np.int32)
        for text, question, answer in zip(questions, encodings, encodings, strict=True):
            between = np.full(len(ids), max(len(text) - 1, 0))
            yield Encoding(
                np.concatenate((question.ids, ids, answer.ids)),
                np.concatenate((question.starts, between, answer.starts + len(text))),
                np.concatenate((question.ends, between, answer.ends + len(text))),
            )

    def _example(self, located: Located, add_end: bool, remarks: tuple[str, ...], encoding: Encoding) -> Example:
        ids = encoding.ids
        answers = located.answers[-1:] if self._last_only else located.answers
        labels = np.where(supervised(encoding, answers), ids, IGNORE)
        prefix = with_prefix(self._prefix, ids)
        if prefix:
            ids = np.concatenate((prefix, ids))
            labels = np.concatenate(([IGNORE] * len(prefix), labels))
        if add_end:
            ids, labels = np.append(ids, self._tokenizer.eos_id), np.append(labels, self._tokenizer.eos_id)
        return Example(ids.astype(np.int32), labels.astype(np.int32), remarks)


def supervised(encoding: Encoding, answers: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return which tokens have a character in an answer, bool [n]: the one place where borders are decided."""
    mask = np.zeros(len(encoding.ids), bool)
    ends = np.maximum(encoding.ends, encoding.starts + 1)
    for start, end in answers:
        mask |= (encoding.starts < end) & (ends > start)
    return mask


def with_prefix(prefix: tuple[int, ...], ids: np.ndarray) -> tuple[int, ...]:
    """Return the begin tokens to put before `ids`: none when the text brought them along."""
    return () if prefix and ids[: len(prefix)].tolist() == list(prefix) else prefix


def trim(conversation: Conversation) -> tuple[Conversation, list[str]]:
    """Leave out what cannot be learned from: answers before the first question, questions after the last answer."""
    turns, remarks = list(conversation.turns), []
    while turns and turns[0].role == "assistant":
        turns.pop(0)
        remarks[:] = ["answer_without_question"]
    questions = len(remarks)
    while turns and turns[-1].role == "user":
        turns.pop()
        remarks[questions:] = ["question_without_answer"]
    if not turns:
        raise BadRow("no answer to a question in it")
    return conversation._replace(turns=tuple(turns)), remarks


def encode_prompt(tokenizer: Tokenizer, template, messages: Sequence[dict]) -> list[int]:
    """Return the ids that ask for an answer to `messages` ({'role': ..., 'content': ...}, OpenAI's roles).

    The ids are those that an answer follows in training. `template` is a name or what `open_template` returned.
    Raises InputError for an unknown role and for a conversation that the template refuses.
    """
    template = open_template(template, tokenizer) if isinstance(template, str) else template
    system, turns = None, []
    for message in messages:
        role = ROLES.get(message.get("role"))
        if role is None:
            raise InputError(f"prompt: unknown role {message.get('role')!r} (system, user or assistant)")
        if role == "system":
            system = message["content"]
        else:
            turns.append(Turn(role, message["content"]))
    try:
        text = template.render(system, turns, prompt=True)
    except BadRow as reason:
        raise InputError(f"prompt: {reason}") from None
    ids = tokenizer.encode([text])[0].ids
    before = with_prefix(tokenizer.prefix_ids, ids) if template.adds_prefix else ()
    return [*before, *ids.tolist(), *tokenizer.answer_ids]
