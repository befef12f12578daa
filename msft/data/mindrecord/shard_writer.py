"""One shard on its way to disk: rows into pages, positions into the index, the header last."""

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msft.data.mindrecord import codec
from msft.data.mindrecord.header import SIZE_BYTES
from msft.errors import InputError, RunError

HEADER_SIZE = 1 << 24
PAGE_SIZE = 1 << 25
BUFFER = 1 << 20
INDEX_BATCH = 1000

# A row without scalar columns still has a raw part: the msgpack map {"id": 0} behind its size.
_NO_SCALARS = b"\x81\xa2id\x00"
_RAW_ROW = len(_NO_SCALARS).to_bytes(SIZE_BYTES, "little") + _NO_SCALARS

_TABLES = """
CREATE TABLE INDEXES(  ROW_ID               INT  NOT NULL, PAGE_ID_RAW          INT  NOT NULL,
 PAGE_OFFSET_RAW      INT  NOT NULL, PAGE_OFFSET_RAW_END  INT  NOT NULL,
 ROW_GROUP_ID         INT  NOT NULL, PAGE_ID_BLOB         INT  NOT NULL,
 PAGE_OFFSET_BLOB     INT  NOT NULL, PAGE_OFFSET_BLOB_END INT  NOT NULL, PRIMARY KEY(ROW_ID));
CREATE TABLE SHARD_NAME(NAME TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Schema:
    """A set's columns (name -> type, in order) and its description."""

    columns: dict[str, str]
    description: str

    def to_json(self) -> dict:
        """Return the schema as it stands in the header."""
        fields = {name: {"shape": [-1], "type": kind} for name, kind in self.columns.items()}
        return {"blob_fields": list(fields), "desc": self.description, "schema": fields}

    @property
    def compressed(self) -> bool:
        """Whether integers are compressed: MindSpore does so in every file with an integer array."""
        return any(kind in ("int32", "int64") for kind in self.columns.values())


class ShardWriter:
    """Streams rows into the hidden file `path` and their positions into `path`.db.

    Memory is one write buffer and one batch of index lines. A group of rows is one blob page; its raw part stands
    behind those of earlier groups in the current raw page, never across two. `saved` counts the bytes that
    integer compression took away. OSError and sqlite3.Error pass through.
    """

    def __init__(self, path: Path, name: str, schema: Schema):
        self.path, self.database, self.saved = path, path.with_name(path.name + ".db"), 0
        self._schema = schema
        self._file = open(path, "wb", buffering=BUFFER)
        self._index = sqlite3.connect(self.database, isolation_level=None)
        self._index.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES)
        self._index.execute("INSERT INTO SHARD_NAME VALUES (?)", (name,))
        self._index.execute("BEGIN")
        self._lines: list[tuple[int, ...]] = []
        self._pages: list[dict] = []
        self._blob: dict | None = None
        self._raw: dict | None = None
        self._rows = 0

    def write(self, arrays: list[np.ndarray]) -> None:
        """Append one row of 1-D arrays in the schema's order and dtypes."""
        self.append(codec.join([self._encode(array) for array in arrays]), sum(array.nbytes for array in arrays))

    def append(self, blob: bytes, nbytes: int) -> None:
        """Append one row as `codec` writes it, of arrays of `nbytes` bytes."""
        size = SIZE_BYTES + len(blob)
        if size > PAGE_SIZE:
            raise InputError(f"row of {len(blob)} bytes: a MindRecord page holds {PAGE_SIZE - SIZE_BYTES}")
        if self._blob is None or self._blob["page_size"] + size > PAGE_SIZE or self._raw_page_is_full():
            self._end_group()
            self._start_group()
        start, raw = self._blob["page_size"], self._raw["page_size"]
        self._file.write(len(blob).to_bytes(SIZE_BYTES, "little"))
        self._file.write(blob)
        self._lines.append(
            (self._rows, self._raw["page_id"], raw, raw + len(_RAW_ROW))
            + (self._blob["page_type_id"], self._blob["page_id"], start, start + size)
        )
        self._rows += 1
        self.saved += nbytes - (len(blob) - codec.joint_bytes(len(self._schema.columns)))
        self._blob["page_size"] = start + size
        self._blob["end_row_id"] = self._rows
        self._raw["page_size"] = raw + len(_RAW_ROW)
        if len(self._lines) == INDEX_BATCH:
            self._flush_lines()

    def finish(self, shard_names: list[str], number: int, saved: int) -> None:
        """Write header and index and close both files; `saved` is the compression of the whole set."""
        self._end_group()
        for page in self._pages:
            page["shard_id"] = number
        header = {
            "header_size": HEADER_SIZE,
            "index_fields": None,
            "page": self._pages or None,
            "page_size": PAGE_SIZE,
            "compression_size": max(0, saved),
            "schema": [self._schema.to_json()],
            "shard_addresses": shard_names,
            "shard_id": number,
            "statistics": None,
            "version": "3.0",
        }
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if SIZE_BYTES + len(text) > HEADER_SIZE:
            raise RunError(f"{shard_names[number]}: {len(self._pages)} pages do not fit one header; use more shards")
        self._file.seek(0)
        self._file.write(len(text).to_bytes(SIZE_BYTES, "little") + text)
        self._flush_lines()
        self._index.execute("COMMIT")
        self.close()

    def close(self) -> None:
        """Close both files, whatever state they are in."""
        self._index.close()
        self._file.close()

    def _encode(self, array: np.ndarray) -> bytes:
        if not self._schema.compressed or array.dtype not in codec.COMPRESSED:
            return array.tobytes()
        return codec.compress(array)

    def _raw_page_is_full(self) -> bool:
        return self._raw["page_size"] + len(_RAW_ROW) > PAGE_SIZE

    def _start_group(self) -> None:
        group = 0 if self._blob is None else self._blob["page_type_id"] + 1
        self._blob = self._add_page("BLOB_DATA", group, [{"id": 0, "offset": 0}])
        self._blob["start_row_id"] = self._blob["end_row_id"] = self._rows
        if self._raw is None or self._raw_page_is_full():
            self._raw = self._add_page("RAW_DATA", 0 if self._raw is None else self._raw["page_type_id"] + 1, [])
        self._raw["row_group_ids"].append({"id": group, "offset": self._raw["page_size"]})
        self._file.seek(_position(self._blob))

    def _add_page(self, kind: str, number: int, groups: list[dict]) -> dict:
        page = {
            "end_row_id": 0,
            "page_id": len(self._pages),
            "page_size": 0,
            "page_type": kind,
            "page_type_id": number,
            "row_group_ids": groups,
            "shard_id": 0,
            "start_row_id": 0,
        }
        self._pages.append(page)
        return page

    def _end_group(self) -> None:
        if self._blob is not None:
            rows = self._blob["end_row_id"] - self._blob["start_row_id"]
            self._file.seek(_position(self._raw) + self._raw["row_group_ids"][-1]["offset"])
            self._file.write(_RAW_ROW * rows)

    def _flush_lines(self) -> None:
        self._index.executemany("INSERT INTO INDEXES VALUES (?, ?, ?, ?, ?, ?, ?, ?)", self._lines)
        self._lines.clear()


def _position(page: dict) -> int:
    return HEADER_SIZE + page["page_id"] * PAGE_SIZE
