"""Rows whose keys are called otherwise: what LLaMA-Factory's `dataset_info.json` says about a file."""

from typing import NamedTuple

from msft.data.formats import BadRow, Conversation, Turn, history, text


class Columns(NamedTuple):
    """Where a row's parts stand; None: it has no such part.

    `is_turns`: the row is a list of turns under `messages` (ShareGPT's), with roles and words under their tags; else
    it is one question and answer (Stanford alpaca's).
    """

    is_turns: bool = False
    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    system: str | None = None
    messages: str | None = "conversations"
    role_tag: str | None = "from"
    content_tag: str | None = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    system_tag: str | None = "system"

    def conversation(self, row) -> Conversation:
        """Read one row; raises BadRow with the reason."""
        if not isinstance(row, dict):
            raise BadRow("not a JSON object")
        return self._turns(row) if self.is_turns else self._question(row)

    def running_text(self, row) -> str:
        """Return the text of a row that is trained on as a whole; raises BadRow with the reason."""
        if not isinstance(row, dict):
            raise BadRow("not a JSON object")
        return text(row, self.prompt or "text")

    def _question(self, row: dict) -> Conversation:
        parts = [text(row, key, optional=True) for key in (self.prompt, self.query) if key]
        asked = "\n".join(filter(None, parts))
        if not asked.strip():
            raise BadRow(f"nothing is asked: {' and '.join(filter(None, (self.prompt, self.query)))} are empty")
        earlier = history({"history": row.get(self.history)}) if self.history else []
        answer = text(row, self.response or "output")
        return Conversation((*earlier, Turn("user", asked), Turn("assistant", answer)), self._system(row))

    def _turns(self, row: dict) -> Conversation:
        entries = row.get(self.messages or "conversations")
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise BadRow(f"'{self.messages}' is no list of turns")
        system, turns = self._system(row), []
        if self.system_tag and entries[0].get(self.role_tag) == self.system_tag:
            system, entries = text(entries[0], self.content_tag) or None, entries[1:]
        roles = {self.user_tag: "user", self.assistant_tag: "assistant"}
        for number, entry in enumerate(entries):
            role, expected = roles.get(entry.get(self.role_tag)), ("user", "assistant")[number % 2]
            if role != expected:
                found = entry.get(self.role_tag)
                raise BadRow(f"turn {number + 1} has '{self.role_tag}' {found!r}, expected the {expected}'s")
            turns.append(Turn(role, text(entry, self.content_tag)))
        if len(turns) % 2 or not turns:
            raise BadRow("the last turn is not the assistant's")
        return Conversation(tuple(turns), system)

    def _system(self, row: dict) -> str | None:
        return text(row, self.system, optional=True) or None if self.system else None
