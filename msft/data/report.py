"""What became of every row: the summary that ends preprocessing, and its JSON file."""

import os
from collections import Counter
from typing import NamedTuple

from msft import console, files

SHOWN_BAD_ROWS = 10

# Remarks about single rows, as the summary words them.
REMARKS = {
    "empty_answer": "with an empty answer, which is not supervised",
    "answer_without_question": "beginning with answers, which are left out",
    "question_without_answer": "ending with questions, which are left out",
    "earlier_answers": "with earlier answers in their source, each of which is an example of its own",
    "system_left_out": "whose system message the template leaves out",
    "answer_without_opening": "with answers that do not follow the template's opening",
    "earlier_answers_read_only": "of which the last answer alone is learned: the rest is read in both directions",
    "special_in_words": "with special tokens written in their words, read as such",
}


class Dropped(NamedTuple):
    """A row that is not in the output: its file, its number in it (from 0) and the reason."""

    file: str
    row: int
    reason: str


class Report:
    """Counts of rows and tokens, rows that were dropped, and the settings they depend on.

    `origin` says what the output was made from (`msft.data.origin`).
    """

    def __init__(self, settings: dict):
        self.settings = settings
        self.rows = Counter(read=0, written=0, bad=0, without_supervision=0, cut=0)
        self.tokens = Counter(written=0, supervised=0, padding=0, cut_off=0)
        self.remarks = Counter()
        self.dropped: list[Dropped] = []
        self.notes: list[str] = []
        self.origin: dict = {}
        self.seconds = 0.0

    @property
    def rows_per_second(self) -> float:
        """Rows read per second of wall time."""
        return self.rows["read"] / self.seconds if self.seconds else 0.0

    def drop_bad(self, file: str, row: int, reason: str) -> None:
        """Count a row that cannot be used."""
        self.rows["bad"] += 1
        self.dropped.append(Dropped(file, row, reason))

    def show(self, bad_rows: int | None = SHOWN_BAD_ROWS) -> None:
        """Print the summary table, then the first `bad_rows` dropped rows (None: all) to standard error."""
        labels = {
            "read": "rows read",
            "written": "rows written",
            "bad": "dropped: bad rows",
            "without_supervision": "dropped: nothing supervised left",
            "cut": "cut, being too long",
        }
        table = [(labels[key], count) for key, count in self.rows.items() if count or key in ("read", "written")]
        table += [(f"rows {REMARKS[key]}", count) for key, count in self.remarks.items()]
        names = {"written": "tokens", "supervised": "supervised", "padding": "padding", "cut_off": "tokens cut off"}
        table += [(names[key], count) for key, count in self.tokens.items() if count]
        width = max(len(label) for label, _ in table)
        for label, count in table:
            console.say(f"{label:<{width}}  {count:>12,}")
        for note in self.notes:
            console.say(note)
        console.say(f"{self.seconds:.1f} s, {self.rows_per_second:,.0f} rows/s")
        for each in self.dropped[:bad_rows]:
            console.warn(f"dropped {each.file} row {each.row}: {each.reason}")
        if bad_rows is not None and len(self.dropped) > bad_rows:
            console.warn(f"... and {len(self.dropped) - bad_rows} more dropped rows, all in the report")

    def write(self, path: str | os.PathLike) -> None:
        """Write everything as JSON."""
        files.write_json(
            path,
            {
                **self.settings,
                "rows": dict(self.rows),
                "remarks": dict(self.remarks),
                "tokens": dict(self.tokens),
                "notes": self.notes,
                "seconds": round(self.seconds, 3),
                "rows_per_second": round(self.rows_per_second, 1),
                **self.origin,
                "dropped": [each._asdict() for each in self.dropped],
            },
        )
