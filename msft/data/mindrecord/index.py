"""Where each row of a shard lies in its file: asked from the `.db` beside it, or found by walking the pages.

Format: MindSpore, minddata/mindrecord/io/shard_index_generator.cc. The `.db` is SQLite with one line a row in the
table INDEXES. Every row's blob, and every row's scalar columns, stand in their page behind their size
(uint64, little-endian), row after row: that is enough to find them without the `.db`.
"""

import os
import sqlite3
import threading
from array import array
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

from msft.data.mindrecord.header import SIZE_BYTES, Header, Page

_LOOK_UP = (
    "SELECT PAGE_ID_BLOB, PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END, PAGE_ID_RAW, PAGE_OFFSET_RAW, PAGE_OFFSET_RAW_END"
    " FROM INDEXES WHERE ROW_ID BETWEEN ? AND ? ORDER BY ROW_ID"
)
_STEPS_ALLOWED = 1_000_000


class Place(NamedTuple):
    """File positions of a row's blob and scalar columns, each with the size in front of it."""

    blob: int
    blob_end: int
    raw: int
    raw_end: int


class SqliteIndex:
    """The `.db` beside a shard, opened read-only and asked for one row at a time.

    Raises ValueError saying what is wrong when the file is no such index or does not fit the shard.
    """

    def __init__(self, path: Path, header: Header):
        self._header = header
        self._pages = {page.id: page for page in header.pages}
        self._raw_pages = {page.id: page for page in header.raw_pages}
        self._lock = threading.Lock()
        uri = path.resolve().as_uri() + "?mode=ro&immutable=1"
        try:
            self._database = sqlite3.connect(uri, uri=True, check_same_thread=False)
            self._database.execute("PRAGMA trusted_schema = OFF")
            # A crafted schema could make one look-up run for ever: count SQLite's steps and stop it.
            self._database.set_progress_handler(lambda: 1, _STEPS_ALLOWED)
        except sqlite3.Error as error:
            raise ValueError(f"{path.name} cannot be opened: {error}") from None
        self._name = path.name
        self._check()

    def _check(self) -> None:
        kinds = self._ask("SELECT type FROM sqlite_master WHERE name = 'INDEXES'")
        if kinds != [("table",)]:
            raise ValueError(f"{self._name} is not a MindRecord index (it has no table INDEXES)")
        last = self._ask("SELECT MAX(ROW_ID) FROM INDEXES")[0][0]
        rows = 0 if last is None else last + 1 if isinstance(last, int) else last
        if rows != self._header.rows:
            raise ValueError(f"{self._name} does not match: it indexes {rows} rows, the file has {self._header.rows}")
        if self._header.rows:
            self.locate(0)

    def _ask(self, query: str, *values) -> list[tuple]:
        try:
            with self._lock:
                return self._database.execute(query, values).fetchmany(2)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            # SQLite's words may quote the file, line breaks included.
            raise ValueError(f"{self._name} is damaged: {str(error)!r:.200}") from None

    def locate(self, row: int) -> Place:
        """Return where a row lies; raises ValueError when the index points outside the row's pages, or not behind the
        row before: an index has no checksum, and a changed entry could give out another row."""
        lines = self._ask(_LOOK_UP, max(0, row - 1), row)
        if len(lines) != min(row, 1) + 1 or not all(isinstance(value, int) for line in lines for value in line):
            raise ValueError(f"{self._name} has no valid entry for row {row}")
        blob_id, blob, blob_end, raw_id, raw, raw_end = lines[-1]
        page, raw_page = self._pages.get(blob_id), self._raw_pages.get(raw_id)
        fits = page and page.first <= row < page.end and 0 <= blob <= blob_end - SIZE_BYTES <= page.size - SIZE_BYTES
        if not fits or not raw_page or not 0 <= raw <= raw_end - SIZE_BYTES <= raw_page.size - SIZE_BYTES:
            raise ValueError(f"{self._name} does not match the file: it places row {row} outside its pages")
        if row == page.first:
            expected = (0, raw_page.groups.get(page.group))
        else:
            expected = (lines[0][2], lines[0][5])
        if (blob, raw) != expected:
            raise ValueError(f"its index says bytes {blob} and {raw} ({self._name}), where {expected} are due")
        return Place(page.offset + blob, page.offset + blob_end, raw_page.offset + raw, raw_page.offset + raw_end)


class WalkedIndex:
    """Row positions found by stepping over the sizes in front of the rows, one page when it is first asked for."""

    def __init__(self, descriptor: int, header: Header):
        self._descriptor = descriptor
        self._pages = header.pages
        self._ends = [page.end for page in header.pages]
        self._groups = {id: (page, start) for page in header.raw_pages for id, start in page.groups.items()}
        self._walked: dict[int, tuple[array, array]] = {}

    def locate(self, row: int) -> Place:
        """Return where a row lies; raises ValueError when the sizes in its page lead outside the page."""
        number = bisect_right(self._ends, row)
        page = self._pages[number]
        if number not in self._walked:
            self._walked[number] = self._walk(page)
        blob, raw = self._walked[number]
        step = row - page.first
        return Place(blob[step], blob[step + 1], raw[step], raw[step + 1])

    def _walk(self, page: Page) -> tuple[array, array]:
        if page.group not in self._groups:
            raise ValueError(f"no raw page names row group {page.group}")
        raw_page, start = self._groups[page.group]
        rows = page.end - page.first
        return (
            self._positions(page.offset, page.offset + page.size, rows, f"page {page.id}"),
            self._positions(raw_page.offset + start, raw_page.offset + raw_page.size, rows, f"page {raw_page.id}"),
        )

    def _positions(self, start: int, end: int, rows: int, where: str) -> array:
        positions = array("Q", [start])
        for _ in range(rows):
            start += SIZE_BYTES + int.from_bytes(os.pread(self._descriptor, SIZE_BYTES, start), "little")
            if start > end:
                raise ValueError(f"{where} is damaged: its row {len(positions) - 1} ends behind it")
            positions.append(start)
        return positions
