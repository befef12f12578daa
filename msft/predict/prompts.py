"""Prompts as token ids: through a chat template, or as they are."""

from collections.abc import Sequence
from pathlib import Path

from msft.data import encode
from msft.data.ends import answer_ends
from msft.data.seq2seq import closed
from msft.data.templates import open_template
from msft.data.tokenizers import Tokenizer
from msft.errors import InputError


class Prompts:
    """Encodes prompts with one template; `template` None takes the texts as they are.

    What is asked of an encoder-decoder `is_closed` by the end token.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, system: str | None = None, is_closed: bool = False):
        self._tokenizer, self._is_closed = tokenizer, is_closed
        self._template = open_template(template, tokenizer) if template else None
        self._system = [{"role": "system", "content": system}] if system else []

    def encode(self, text: str) -> list[int]:
        """Return the ids that ask for an answer; an empty plain text starts from the begin token.

        Raises InputError when there is no begin token to start from, or no end token to close with.
        """
        ids = self._ids(text)
        return closed(self._tokenizer, ids) if self._is_closed else self._started(ids)

    def _ids(self, text: str) -> list[int]:
        if self._template:
            messages = [*self._system, {"role": "user", "content": text}]
            return encode.encode_prompt(self._tokenizer, self._template, messages)
        ids = self._tokenizer.encode([text])[0].ids.tolist()
        return [*self._tokenizer.prefix_ids, *ids, *self._tokenizer.answer_ids]

    def _started(self, ids: list[int]) -> list[int]:
        if ids:
            return ids
        if self._tokenizer.bos_id is None:
            raise InputError("prompt: an empty one needs a tokenizer with a begin token")
        return [self._tokenizer.bos_id]

    def stop_ids(self, model_ends: tuple[int, ...], stops: Sequence[str] = ()) -> tuple[int, ...]:
        """Return the token ids that end an answer: the model's, the tokenizer's and the template's.

        Those of `stops` that are special tokens are among them, as these never show in an answer's text.
        """
        special = self._tokenizer.special_tokens
        own = answer_ends(self._tokenizer, self._template, model_ends).ids
        return tuple(sorted({*own, *(special.get(stop) for stop in stops)} - {None}))

    def stop_texts(self) -> tuple[str, ...]:
        """Return the template's plain texts that end an answer."""
        return answer_ends(self._tokenizer, self._template).texts


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file that are not blank; raises InputError when there are none."""
    try:
        # Only line feeds end a line: a prompt may hold the other characters that splitlines() cuts at.
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not lines:
        raise InputError(f"{path}: holds no prompt")
    return lines
