"""Rows of instruction data -> one neutral `Conversation`.

Formats, told apart by their keys: Stanford alpaca (`instruction`, `input`, `output`, LLaMA-Factory's `system` and
`history`), ShareGPT as FastChat and MindFormers write it (`conversations` with `from`, `value`), OpenAI's
(`messages` with `role`, `content`), and Firefly's (`conversation` with `human`, `assistant`).
"""

from typing import NamedTuple

from msft.errors import did_you_mean

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",
}
FORMAT_KEYS = ("conversations", "messages", "conversation", "instruction")


class BadRow(ValueError):
    """A row that cannot become training data; the message is the reason."""


class Turn(NamedTuple):
    """What one side says; `role` is 'user' or 'assistant'."""

    role: str
    text: str


class Conversation(NamedTuple):
    """Turns in order, as written in the data, and the system message if the row has one."""

    turns: tuple[Turn, ...]
    system: str | None = None


def conversation(row) -> Conversation:
    """Read one row of any known format; raises BadRow with the reason."""
    if not isinstance(row, dict):
        raise BadRow(f"not a JSON object but {_kind(row)}")
    if "conversations" in row:
        return _from_messages(row, "conversations", "from", "value")
    if "messages" in row:
        return _from_messages(row, "messages", "role", "content")
    if "conversation" in row:
        return _from_pairs(row)
    if "instruction" in row or "output" in row:
        return _from_alpaca(row)
    keys = ", ".join(map(repr, row)) or "none"
    near = next(filter(None, (did_you_mean(str(key), FORMAT_KEYS) for key in row)), "")
    raise BadRow(f"no 'conversations', 'messages', 'conversation' or 'instruction' among its keys ({keys}){near}")


def is_alpaca(row) -> bool:
    """Whether a row is in the alpaca format rather than a list of turns."""
    return isinstance(row, dict) and not {"conversations", "messages", "conversation"} & row.keys()


def _from_alpaca(row: dict) -> Conversation:
    prompt = "\n".join(filter(None, (text(row, "instruction"), text(row, "input", optional=True))))
    if not prompt.strip():
        raise BadRow("'instruction' and 'input' are empty")
    turns = [*history(row), Turn("user", prompt), Turn("assistant", text(row, "output"))]
    return Conversation(tuple(turns), text(row, "system", optional=True) or None)


def history(row: dict) -> list[Turn]:
    """Return the earlier turns of an alpaca row: `history` is a list of [user, assistant] pairs."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list):
        raise BadRow(f"'history' is {_kind(pairs)}, not a list of [user, assistant] pairs")
    turns = []
    for number, pair in enumerate(pairs, 1):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise BadRow(f"'history' entry {number} is not a [user, assistant] pair")
        for role, words in zip(("user", "assistant"), pair, strict=True):
            turns.append(Turn(role, _checked(words, f"'history' entry {number}")))
    return turns


def _from_pairs(row: dict) -> Conversation:
    pairs, turns = row["conversation"], []
    if not isinstance(pairs, list) or not pairs:
        raise BadRow(f"'conversation' is {_kind(pairs)}, not a list of {{'human', 'assistant'}} objects")
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, dict):
            raise BadRow(f"'conversation' entry {number} is {_kind(pair)}, not an object")
        for role, key in (("user", "human"), ("assistant", "assistant")):
            turns.append(Turn(role, _checked(pair.get(key), f"'conversation' entry {number}: '{key}'")))
    return Conversation(tuple(turns), text(row, "system", optional=True) or None)


def _from_messages(row: dict, list_key: str, role_key: str, text_key: str) -> Conversation:
    entries = row[list_key]
    if not isinstance(entries, list) or not entries:
        raise BadRow(f"'{list_key}' is {_kind(entries)}, not a list of turns")
    system = text(row, "system", optional=True) or None
    turns = []
    for number, entry in enumerate(entries, 1):
        where = f"'{list_key}' entry {number}"
        if not isinstance(entry, dict):
            raise BadRow(f"{where} is {_kind(entry)}, not an object")
        role = entry.get(role_key)
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"{where}: unknown '{role_key}' {role!r}{did_you_mean(str(role), ROLES)}")
        if entry.get("tool_calls"):
            raise BadRow(f"{where}: tool calls are not supported")
        words = _checked(entry.get(text_key), f"{where}: '{text_key}'")
        if ROLES[role] != "system":
            turns.append(Turn(ROLES[role], words))
        elif turns or (system and number > 1):
            raise BadRow(f"{where}: a system message must come first")
        else:
            system = words or None
    if not turns:
        raise BadRow(f"'{list_key}' has no turns")
    return Conversation(tuple(turns), system)


def text(row: dict, key: str, optional: bool = False) -> str:
    """Return the text under `key`; a missing or null optional one is ''. Raises BadRow."""
    if row.get(key) is None:
        if optional:
            return ""
        raise BadRow(f"'{key}' is missing" if key not in row else f"'{key}' is null")
    return _checked(row[key], f"'{key}'")


def _checked(value, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} is {_kind(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(f"{what} holds half a surrogate pair, which is not Unicode text") from None
    return value


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return "an empty list" if value == [] else kinds.get(type(value), "a number")
