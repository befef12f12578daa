"""Reading rows from JSON lists and JSON Lines in byte ranges, so that processes can share one file.

A `Chunk` names a range of whole rows; only the process that encodes them makes objects of them to keep. Neither
finding the ranges nor parsing one holds more than a few megabytes, however long the file is.
"""

import glob
import json
import os
from collections.abc import Iterator
from json.decoder import WHITESPACE
from pathlib import Path
from typing import BinaryIO, NamedTuple

from msft.data.columns import Columns
from msft.data.formats import BadRow
from msft.errors import InputError

CHUNK_BYTES = 1 << 17
ROW_LIMIT = 1 << 28

_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"


class Chunk(NamedTuple):
    """Whole rows of `path`, the first of them row `first`: bytes `start` to `end` of a JSON list or of JSON `lines`."""

    path: str
    start: int
    end: int
    first: int
    lines: bool


class Source(NamedTuple):
    """A file of rows: how its keys are called (None: any known format), and how many of its rows count (None: all)."""

    path: str
    columns: Columns | None = None
    limit: int | None = None

    def chunks(self) -> Iterator[Chunk]:
        """Yield the row ranges that hold the rows that count."""
        for chunk in chunks(self.path):
            if self.limit is not None and chunk.first >= self.limit:
                return
            yield chunk

    def rows(self, chunk: Chunk) -> Iterator[tuple[int, object]]:
        """Yield (index, row) for the rows of a chunk that count, as `rows` does."""
        return ((number, row) for number, row in rows(chunk) if self.limit is None or number < self.limit)


def find_files(pattern: str) -> list[str]:
    """Return the files that a path or glob pattern matches, sorted; raises InputError naming it when none does."""
    if os.path.isfile(pattern):
        return [pattern]
    files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not files:
        raise InputError(f"--input_glob: no file matches {pattern!r} (looked in {Path.cwd()})")
    return files


def chunks(path: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Yield the row ranges of a file in order, each about `chunk_bytes` long; raises InputError on broken JSON."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        start = len(_BOM) if head.startswith(_BOM) else 0
        content = head[start:].lstrip(_SPACE)
        if content.startswith(b"["):
            yield from _list_chunks(file, path, len(head) - len(content) + 1, chunk_bytes)
        elif content.startswith(b"{") and content.split(b"\n", 1)[0].strip() != b"{":
            yield from _line_chunks(file, path, start, chunk_bytes)
        elif content:
            raise InputError(f"{path}: neither a JSON list of rows nor JSON Lines (one row a line), in UTF-8")


def rows(chunk: Chunk) -> Iterator[tuple[int, object]]:
    """Yield (index, row) for each row of a chunk; a line that is not JSON gives the BadRow that says why."""
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start)
        data = file.read(chunk.end - chunk.start)
    if chunk.lines:
        lines = (line for line in data.split(b"\n") if line.strip())
        yield from enumerate(map(_parse_line, lines), chunk.first)
        return
    try:
        yield from enumerate(json.loads(b"[" + data + b"]"), chunk.first)
    except UnicodeDecodeError as error:
        raise InputError(f"{chunk.path}: not UTF-8 text at byte {chunk.start + error.start - 1}") from None


def _parse_line(line: bytes):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow(f"not JSON: {error}")


def _line_chunks(file: BinaryIO, path: str, start: int, chunk_bytes: int) -> Iterator[Chunk]:
    first = 0
    file.seek(start)
    while data := file.read(chunk_bytes):
        if not data.endswith(b"\n"):
            data += file.readline(ROW_LIMIT)
        if len(data) >= ROW_LIMIT:
            raise InputError(f"{path} row {first}: longer than {ROW_LIMIT >> 20} MB")
        yield Chunk(path, start, start + len(data), first, lines=True)
        first += sum(1 for line in data.split(b"\n") if line.strip())
        start += len(data)


def _list_chunks(file: BinaryIO, path: str, start: int, chunk_bytes: int) -> Iterator[Chunk]:
    first = count = 0
    for count, end in enumerate(_value_ends(file, path, start, chunk_bytes), 1):
        if end - start >= chunk_bytes:
            yield Chunk(path, start, end, first, lines=False)
            start, first = end + 1, count
    if count > first:
        yield Chunk(path, start, end, first, lines=False)


def _value_ends(file: BinaryIO, path: str, start: int, block: int) -> Iterator[int]:
    """Yield where each value of a JSON list ends: the offset of the comma or bracket after it."""
    # Read as Latin-1 one character is one byte, and JSON's own signs are ASCII: positions are file offsets.
    decode = json.JSONDecoder().raw_decode
    file.seek(start)
    buffer, position, number, at_end = "", 0, 0, False
    while True:
        try:
            begin = _skip_space(buffer, position)
            if buffer[begin] == "]" and number == 0:
                position = begin + 1
                break
            end = _skip_space(buffer, decode(buffer, begin)[1])
            sign = buffer[end]
        except (ValueError, IndexError) as error:
            if at_end or len(buffer) - position > ROW_LIMIT:
                raise InputError(f"{path} row {number}: {_complaint(error)}") from None
            more = file.read(max(block, len(buffer) - position)).decode("latin-1")
            at_end = not more
            buffer, start, position = buffer[position:] + more, start + position, 0
            continue
        except RecursionError:
            raise InputError(f"{path} row {number}: nested too deeply") from None
        if sign not in ",]":
            raise InputError(f"{path} row {number}: expected ',' or ']' after the row, found {sign!r}")
        yield start + end
        number, position = number + 1, end + 1
        if sign == "]":
            break
    if (buffer[position:] + file.read(1 << 16).decode("latin-1")).strip(" \t\r\n"):
        raise InputError(f"{path}: text after the end of the list")


def _skip_space(text: str, position: int) -> int:
    return WHITESPACE.match(text, position).end()


def _complaint(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError) and "Unterminated" not in error.msg:
        return f"broken JSON: {error.msg}"
    return "the file ends within the row, or the JSON is broken there"
