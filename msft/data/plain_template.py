"""'plain': what is said as it is, as T5's tasks are written, without marks of who says it."""

from collections.abc import Sequence

from msft.data.formats import Turn

PLAIN = "plain"


class PlainTemplate:
    """The system message and the turns, a line end between two of them."""

    adds_prefix = True
    marks_answers = False
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    name = PLAIN
    source = "system and turns, joined by line ends"

    def render(self, system: str | None, turns: Sequence[Turn], prompt: bool = False) -> str:
        """Return the text of a conversation; nothing opens an answer, whether it is a `prompt` or not."""
        return "\n".join([*filter(None, [system]), *(turn.text for turn in turns)])
