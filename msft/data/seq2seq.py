"""Conversations -> sources and answers in tokens, for models with an encoder.

A row is a source (what comes before an answer, in the template's words, closed by the end token) and behind it the
decoder's start token and the answer, closed by the end token as well; the answer alone is supervised.
"""

from collections.abc import Sequence

import numpy as np

from msft.backend.contract import IGNORE
from msft.data.answers import AnswerFinder
from msft.data.encode import Example, trim, with_prefix
from msft.data.formats import BadRow, Conversation
from msft.data.tokenizers import Tokenizer
from msft.errors import InputError


class Seq2SeqEncoder:
    """Turns conversations into examples as `encode.Encoder` does, an example for each answer.

    With `last_answer_only` the last one's alone. `start_id` is the decoder's start token.
    """

    def __init__(self, tokenizer: Tokenizer, template, start_id: int, last_answer_only: bool = False):
        self._tokenizer, self._template, self._start = tokenizer, template, start_id
        self._last_only = last_answer_only
        self._finder = AnswerFinder(template, tokenizer.special_tokens)

    def parts(self, conversation: Conversation) -> list[Conversation]:
        """Return a conversation up to each answer that has a question before it; what stands behind the last, too."""
        turns = conversation.turns
        roles = [turn.role for turn in turns]
        answers = [number for number, role in enumerate(roles) if role == "assistant" and "user" in roles[:number]]
        ends = [len(turns)] if self._last_only else [*(number + 1 for number in answers[:-1]), len(turns)]
        return [conversation._replace(turns=turns[:end]) for end in ends]

    def encode(self, conversations: Sequence[Conversation]) -> list[Example | BadRow]:
        """Return an example for each part of a conversation, or the BadRow that says why there is none."""
        prepared = [self._prepare(conversation) for conversation in conversations]
        texts = [text for each in prepared if not isinstance(each, BadRow) for text in each[:2]]
        encodings = iter(self._tokenizer.encode(texts))
        return [
            each if isinstance(each, BadRow) else self._example(next(encodings).ids, next(encodings).ids, *each[1:])
            for each in prepared
        ]

    def cut(self, example: Example, length: int) -> Example:
        """Return an example of at most `length` tokens.

        The source loses tokens before its end token, down to half of the row, and then the answer its last ones.
        """
        supervised = np.flatnonzero(example.labels != IGNORE)
        if len(example.ids) <= length or not len(supervised):
            return example._replace(ids=example.ids[:length], labels=example.labels[:length])
        border = int(supervised[0]) - 1
        source = min(border, max(length - (len(example.ids) - border), length // 2))
        kept = np.concatenate((np.arange(source - 1), [border - 1], np.arange(border, border + length - source)))
        return example._replace(ids=example.ids[kept], labels=example.labels[kept])

    def _prepare(self, conversation: Conversation) -> tuple[str, str, tuple[str, ...]] | BadRow:
        try:
            conversation, remarks = trim(conversation)
            *before, answer = conversation.turns
            text = self._template.render(conversation.system, before, prompt=True)
        except BadRow as reason:
            return reason
        if conversation.system and conversation.system.strip() not in text:
            remarks.append("system_left_out")
        if any(turn.role == "assistant" for turn in before):
            remarks.append("earlier_answers")
        if self._finder.special_in("\n".join(turn.text for turn in conversation.turns)):
            remarks.append("special_in_words")
        if not answer.text.strip():
            remarks.append("empty_answer")
        return text, answer.text, tuple(remarks)

    def _example(self, source: np.ndarray, target: np.ndarray, answer: str, remarks: tuple[str, ...]) -> Example:
        prefix = with_prefix(self._tokenizer.prefix_ids, source) if self._template.adds_prefix else ()
        before = [*prefix, *closed(self._tokenizer, source.tolist()), self._start]
        after = closed(self._tokenizer, target.tolist())
        labels = [IGNORE] * len(before) + (after if answer.strip() else [IGNORE] * len(after))
        return Example(np.array([*before, *after], np.int32), np.array(labels, np.int32), remarks)


def closed(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Return tokens with the end token behind them; raises InputError where the tokenizer has none."""
    if tokenizer.eos_id is None:
        raise InputError("tokenizer: has no end token, which an encoder-decoder needs behind sources and answers")
    return ids if ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id]
