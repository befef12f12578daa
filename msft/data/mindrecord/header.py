"""A shard's header: what columns it has and where its pages lie.

Format: MindSpore, minddata/mindrecord/meta/shard_header.cc. A shard begins with a JSON document behind its size
(uint64, little-endian). Page `i` begins at header_size + i * page_size; a blob page holds a group of rows,
a raw page the scalar columns of several groups. Every function here raises ValueError saying what is wrong.
"""

import json
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

VERSIONS = ("2.0", "3.0")
HEADER_SIZES = range(1 << 14, (1 << 27) + 1)
PAGE_SIZES = range(1 << 15, (1 << 28) + 1)
DTYPES = {"int32": "<i4", "int64": "<i8", "float32": "<f4", "float64": "<f8"}
SIZE_BYTES = 8
ENCRYPTED_TAIL = b"ENCRYPT"


@dataclass(frozen=True)
class Column:
    """A column's type by MindRecord's name; `shape` is None for scalars, strings and bytes, -1 is any length."""

    name: str
    type: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Page:
    """A blob page: rows [first, end) of the shard, in `size` bytes from file position `offset`."""

    id: int
    group: int
    first: int
    end: int
    offset: int
    size: int


@dataclass(frozen=True)
class RawPage:
    """A raw page: where in the file it lies and where in it each group of rows begins."""

    id: int
    offset: int
    size: int
    groups: dict[int, int]


@dataclass(frozen=True)
class Header:
    """Everything a reader needs to know of a shard; `pages` are the blob pages in row order."""

    version: str
    columns: tuple[Column, ...]
    blob_columns: tuple[str, ...]
    compressed: bool
    shard_names: tuple[str, ...]
    pages: tuple[Page, ...]
    raw_pages: tuple[RawPage, ...]

    @property
    def rows(self) -> int:
        """Number of rows in the shard."""
        return self.pages[-1].end if self.pages else 0


def read_header(file: BinaryIO, file_size: int) -> Header:
    """Read and check the header of an opened shard; raises ValueError saying what is wrong."""
    size = int.from_bytes(file.read(SIZE_BYTES), "little")
    if not 2 <= size <= min(HEADER_SIZES[-1], file_size - SIZE_BYTES):
        if _is_encrypted(file, file_size):
            raise ValueError("an encrypted MindRecord file; decrypt it with MindSpore first")
        raise ValueError("not a MindRecord file, or a truncated one")
    try:
        document = json.loads(file.read(size))
    except (ValueError, RecursionError):
        raise ValueError("not a MindRecord file (no JSON header at its start)") from None
    try:
        return _parse(document, file_size)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not a MindRecord header: {type(error).__name__} {error}") from None


def _is_encrypted(file: BinaryIO, file_size: int) -> bool:
    file.seek(max(0, file_size - len(ENCRYPTED_TAIL)))
    return file.read() == ENCRYPTED_TAIL


def _parse(document: dict, file_size: int) -> Header:
    version = document["version"]
    if version not in VERSIONS:
        raise ValueError(f"MindRecord version {version!r} is not supported (known: {', '.join(VERSIONS)})")
    if len(document["schema"]) != 1:
        raise ValueError(f"the header has {len(document['schema'])} schemas, not one")
    columns = tuple(_column(name, field) for name, field in document["schema"][0]["schema"].items())
    blob_columns = tuple(document["schema"][0]["blob_fields"])
    expected = {column.name for column in columns if column.shape is not None or column.type == "bytes"}
    if set(blob_columns) != expected or len(blob_columns) != len(expected):
        raise ValueError(f"blob_fields {list(blob_columns)} do not fit the schema's {sorted(expected)}")
    pages, raw_pages = _pages(document, file_size)
    return Header(
        version=version,
        columns=columns,
        blob_columns=blob_columns,
        compressed=version >= "3.0" and any(c.shape is not None and c.type in ("int32", "int64") for c in columns),
        shard_names=tuple(_file_name(name) for name in document["shard_addresses"]),
        pages=pages,
        raw_pages=raw_pages,
    )


def _column(name: str, field: dict) -> Column:
    kind, shape = field["type"], field.get("shape")
    if kind not in (*DTYPES, "string", "bytes"):
        raise ValueError(f"column {name!r} has unknown type {kind!r}")
    if shape is None:
        return Column(name, kind, None)
    lengths = tuple(_integer(length, "shape", least=-1) for length in shape)
    if kind not in DTYPES or lengths.count(-1) > 1 or 0 in lengths or len(lengths) > 16:
        raise ValueError(f"column {name!r} of type {kind} cannot have shape {list(lengths)}")
    return Column(name, kind, lengths)


def _pages(document: dict, file_size: int) -> tuple[tuple[Page, ...], tuple[RawPage, ...]]:
    header_size = _integer(document["header_size"], "header_size")
    page_size = _integer(document["page_size"], "page_size")
    if header_size not in HEADER_SIZES or page_size not in PAGE_SIZES:
        raise ValueError(f"header_size {header_size} or page_size {page_size} is out of range")
    blob, raw, ids = [], [], set()
    for entry in document["page"] or []:
        id, size = _integer(entry["page_id"], "page_id"), _integer(entry["page_size"], "page_size of a page")
        offset = header_size + id * page_size
        if size > page_size or id in ids:
            raise ValueError(f"page {id} of {size} bytes overlaps another page")
        if offset + size > file_size:
            raise ValueError(f"truncated: page {id} ends at byte {offset + size}, the file at {file_size}")
        ids.add(id)
        if entry["page_type"] == "BLOB_DATA":
            first, end = _integer(entry["start_row_id"], "start_row_id"), _integer(entry["end_row_id"], "end_row_id")
            blob.append(Page(id, _integer(entry["page_type_id"], "page_type_id"), first, end, offset, size))
        elif entry["page_type"] == "RAW_DATA":
            groups = {_integer(g["id"], "group"): _integer(g["offset"], "offset") for g in entry["row_group_ids"]}
            raw.append(RawPage(id, offset, size, groups))
        else:
            raise ValueError(f"page {id} has unknown type {entry['page_type']!r}")
    _check_rows(blob)
    return tuple(blob), tuple(raw)


def _check_rows(pages: list[Page]) -> None:
    pages.sort(key=lambda page: (page.first, page.end))
    row = 0
    for page in pages:
        if page.first != row or page.end < row or (page.end - row) * SIZE_BYTES > page.size:
            raise ValueError(f"page {page.id} of {page.size} bytes claims rows {page.first} to {page.end} after {row}")
        row = page.end


def _integer(value, what: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 1 << 62:
        raise ValueError(f"the header's {what} is {str(value)[:40]!r}, not a count")
    return value


def _file_name(name: str) -> str:
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"shard name {str(name)[:80]!r} is not a plain file name")
    return name


def numpy_dtype(column: Column) -> np.dtype:
    """Return the dtype of a numeric column's elements."""
    return np.dtype(DTYPES[column.type])
