"""FastChat's conversation templates by name, such as vicuna_v1.1."""

import copy
from collections.abc import Sequence

from msft.data.formats import BadRow, Turn
from msft.errors import InputError, did_you_mean

# Unicode's noncharacters: one that a conversation does not hold stands for an empty message in it, which FastChat
# would take for "not said yet".
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def template_names() -> list[str]:
    """Return the names of FastChat's templates that have a text form."""
    from fastchat.conversation import conv_templates

    return [name for name, template in conv_templates.items() if template.sep_style is not None]


class NamedTemplate:
    """One of FastChat's templates; its own example turns, if any, come before the conversation's.

    The templates are written for Llama's tokenizer: where the tokenizer at hand has no `<s>` or `</s>`,
    its own begin and end tokens take their place. Rendering raises BadRow unless the turns alternate.
    `source` is everything that makes the template this one.
    """

    adds_prefix = True
    marks_answers = False

    def __init__(self, name: str, tokens: dict[str, str] | None = None):
        from fastchat.conversation import conv_templates

        if name not in template_names():
            why = "has no text form (its model is only served)" if name in conv_templates else "is unknown"
            known = ", ".join(["chat", *template_names(), "plain"])
            near = did_you_mean(name, ["chat", *template_names(), "plain"])
            raise InputError(f"--template: {name!r} {why}{near} (known: {known})")
        self.name = name
        self._template = conv_templates[name].copy()
        for field in ("sep", "sep2", "system_template", "system_message"):
            text = getattr(self._template, field)
            for old, new in (tokens or {}).items():
                text = text and text.replace(old, new)
            setattr(self._template, field, text)
        self.source = repr(self._template)
        stop = self._template.stop_str or ()
        self.stop_strings = (stop,) if isinstance(stop, str) else tuple(stop)
        self.stop_token_ids = tuple(self._template.stop_token_ids or ())

    def render(self, system: str | None, turns: Sequence[Turn], prompt: bool = False) -> str:
        """Return the text of a conversation; `prompt` ends it with the opening of an answer."""
        template = copy.copy(self._template)
        if system is not None:
            template.system_message = system
        messages = [list(message) for message in template.messages]
        empty = _unused([system or "", *(turn.text for turn in turns)])
        for number, turn in enumerate(turns):
            if turn.role != ("user", "assistant")[number % 2]:
                raise BadRow(f"turn {number + 1} is the {turn.role}'s: turns must alternate, the user first")
            messages.append([template.roles[number % 2], turn.text or empty])
        if prompt:
            messages.append([template.roles[1], None])
        template.messages = messages
        return template.get_prompt().replace(empty, "")


def _unused(texts: Sequence[str]) -> str:
    for mark in _NONCHARACTERS:
        if not any(mark in text for text in texts):
            return mark
    raise BadRow("its words hold all of Unicode's noncharacters")
