"""What ends an answer: the mark that training teaches, and what generation stops at.

The rule, for every family: an answer is closed by what its template writes behind it (`mark`: a special token such as
<|im_end|>, else plain text), and where a template writes nothing there, by the tokenizer's end token. Generation stops
at that, at the ends that the model's own files name, and at the template's stop words; where a template marks no end,
also at the special token that opens the next question (<|user|>).
"""

from collections.abc import Mapping
from typing import NamedTuple

from msft.data.answers import AnswerFinder, Located
from msft.data.formats import BadRow, Conversation, Turn
from msft.data.templates import open_template
from msft.data.tokenizers import Tokenizer
from msft.errors import InputError

# The shortest conversation.
PROBE = Conversation((Turn("user", "question"), Turn("assistant", "answer")))


class Ends(NamedTuple):
    """`mark` closes a supervised answer ("" = the end token does); `ids` and `texts` end a generated one."""

    mark: str
    ids: tuple[int, ...]
    texts: tuple[str, ...]


def answer_ends(tokenizer: Tokenizer, template, model_ids: tuple[int, ...] = ()) -> Ends:
    """Return what ends an answer; `template` is a name, what `open_template` returned, or None for plain text.

    `model_ids` are the ends that the model's own files name. Raises InputError when the template refuses a question.
    """
    template = open_template(template, tokenizer) if isinstance(template, str) else template
    if template is None:
        return Ends("", _sorted({*model_ids, tokenizer.eos_id}), ())
    special = tokenizer.special_tokens
    try:
        probe = AnswerFinder(template, special).by_openings(PROBE)
    except BadRow as reason:
        raise InputError(f"--template {template.name}: {reason}") from None
    words = [probe.end_mark or _next_opening(template, special, probe), *template.stop_strings]
    own = set(special.values()).intersection(template.stop_token_ids)
    ids = _sorted({*model_ids, tokenizer.eos_id, *(special.get(word) for word in words), *own})
    return Ends(probe.end_mark, ids, tuple(dict.fromkeys(word for word in words if word and word not in special)))


def _next_opening(template, special: Mapping[str, int], probe: Located) -> str:
    """Return the special token right behind an answer that another question follows, "" for none."""
    try:
        text = template.render(None, (*PROBE.turns, Turn("user", "another")))
    except BadRow:
        return ""
    end = probe.answers[-1][1]
    behind = text[end:].lstrip() if text.startswith(probe.text[:end]) else ""
    return max((word for word in special if behind.startswith(word)), key=len, default="")


def _sorted(ids: set) -> tuple[int, ...]:
    return tuple(sorted(ids - {None}))
