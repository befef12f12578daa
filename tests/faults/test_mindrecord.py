"""Damaged and crafted MindRecord files: rows, or an error naming the file; no traceback, hang or big allocation."""

import json
import shutil
import sqlite3
import tracemalloc

import numpy as np
import pytest
from hypothesis import strategies as st

from msft.data.batches import BatchStream
from msft.data.dataset import kept
from msft.data.mindrecord import codec, open_mindrecord, raw
from tests.data.small_mindrecord import HEADER, ROWS, write_small
from tests.faults.inputs import result_or_error, short_and_long, try_all
from tests.faults.json_values import changed, damaged

TRACED = 32 << 20
FILLERS = {"input_ids": 0, "labels": -100}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small") / "x.mindrecord")


@pytest.fixture
def copy(small, tmp_path):
    for file in (small, database_of(small)):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / small.name


def database_of(path):
    return path.with_name(path.name + ".db")


def read_everything(path):
    """All rows, and a batch of them, as a run reads them."""
    dataset = open_mindrecord(path)
    rows = [dataset.row(index) for index in range(len(dataset))]
    dataset.digest()
    return rows


def rows_or_errors(path) -> list | None:
    """The rows, None for an InputError; every problem names a file of the data's folder."""
    tracemalloc.start()
    try:
        rows = result_or_error(lambda: read_everything(path), str(path.parent))
        assert tracemalloc.get_traced_memory()[1] < TRACED
        return rows
    finally:
        tracemalloc.stop()


def header_of(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def with_header(content: bytes, text: bytes) -> bytes:
    """A file's content with another header of at most its size."""
    text = text[: HEADER - 8]
    return (len(text).to_bytes(8, "little") + text).ljust(HEADER, b"\0") + content[HEADER:]


@short_and_long(80, 2500)
def test_header_bytes(copy, small, count):
    content = small.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")

    def check(head):
        copy.write_bytes(head[:HEADER].ljust(HEADER, b"\0") + content[HEADER:])
        rows_or_errors(copy)

    try_all(count, damaged(content[:end]), check)


@short_and_long(80, 2500)
def test_header_values(copy, small, count):
    content = small.read_bytes()

    def check(document):
        copy.write_bytes(with_header(content, json.dumps(document).encode()))
        rows_or_errors(copy)

    try_all(count, changed(header_of(small)), check)


@short_and_long(80, 2500)
def test_pages(copy, small, count):
    """Any bytes on the pages, found by the index and by walking."""
    content = small.read_bytes()
    places = st.tuples(st.integers(HEADER, len(content) - 8), st.binary(min_size=1, max_size=8))

    def check(drawn):
        changes, indexed = drawn
        data = bytearray(content)
        for position, piece in changes:
            data[position : position + len(piece)] = piece
        copy.write_bytes(data)
        database_of(copy).unlink(missing_ok=True)
        if indexed:
            shutil.copy(database_of(small), database_of(copy))
        rows = rows_or_errors(copy)
        ends = result_or_error(lambda: np.concatenate(list(open_mindrecord(copy).ends(FILLERS))), str(copy.parent))
        if rows is not None and ends is not None:
            # An id that takes more bytes than it needs is not known for padding: never is too much cut.
            kept_of = [max(kept(row[name], filler) for name, filler in FILLERS.items()) for row in rows]
            assert (ends >= kept_of).all()

    try_all(count, st.tuples(st.lists(places, min_size=1, max_size=4), st.booleans()), check)


@short_and_long(80, 2500)
def test_index_bytes(copy, small, count):
    def check(content):
        database_of(copy).write_bytes(content)
        rows_or_errors(copy)

    content = database_of(small).read_bytes()
    try_all(count, damaged(content) | _flipped(content), check)


def _flipped(content: bytes):
    """Content with bytes changed anywhere, evenly spread."""

    def flip(places):
        data = bytearray(content)
        for position, byte in places:
            data[position] = byte
        return bytes(data)

    place = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    return st.lists(place, min_size=1, max_size=8).map(flip)


COLUMNS = "ROW_ID PAGE_ID_RAW PAGE_OFFSET_RAW PAGE_OFFSET_RAW_END PAGE_ID_BLOB PAGE_OFFSET_BLOB PAGE_OFFSET_BLOB_END"
POINTERS = st.one_of(
    st.integers(-2, 70), st.sampled_from([2**31, 2**40, 2**62, 2**63 - 1, -(2**63), 1.5, "x", b"\xff"])
)


@short_and_long(60, 1500)
def test_index_pointers(copy, small, count):
    """Any value in any place of the index; a row that is given out is the row that was written."""
    sound = read_everything(small)

    def check(changes):
        shutil.copy(database_of(small), database_of(copy))
        with sqlite3.connect(database_of(copy)) as database:
            for column, row, value in changes:
                database.execute(f"UPDATE OR REPLACE INDEXES SET {column} = ? WHERE ROW_ID = ?", (value, row))
        database.close()
        rows = rows_or_errors(copy)
        assert rows is None or len(rows) == ROWS
        for row, written in zip(rows or (), sound, strict=False):
            if not any(np.array_equal(row["input_ids"], other["input_ids"]) for other in sound):
                raise AssertionError(f"a row that was never written: {row}, not {written}")

    change = st.tuples(st.sampled_from(COLUMNS.split()), st.integers(0, ROWS - 1), POINTERS)
    try_all(count, st.lists(change, min_size=1, max_size=3), check)


@short_and_long(200, 4000)
def test_codec(count):
    """Arbitrary bytes are an array or a ValueError; what decodes, encodes to an array that decodes to the same."""

    def check(drawn):
        data, name, columns = drawn
        for decode in (lambda: codec.split(data, columns), lambda: raw.unpack(data)):
            try:
                decode()
            except ValueError:
                pass
        try:
            values = codec.decompress(data, np.dtype(name))
        except ValueError:
            return
        np.testing.assert_array_equal(codec.decompress(codec.compress(values), np.dtype(name)), values)

    try_all(count, st.tuples(st.binary(max_size=200), st.sampled_from(["<i4", "<i8"]), st.integers(1, 3)), check)


@short_and_long(100, 1000)
def test_compression_is_lossless(count):
    def check(values):
        for dtype in (np.dtype("<i4"), np.dtype("<i8")):
            array = np.array(values, np.int64).astype(dtype)
            np.testing.assert_array_equal(codec.decompress(codec.compress(array), dtype), array, strict=True)

    try_all(count, st.lists(st.integers(-(2**63), 2**63 - 1)), check)


@short_and_long(30, 600)
def test_shards(tmp_path, count):
    """A set of three shards with files missing, swapped, emptied or cut: whole, or an error."""
    first = write_small(tmp_path / "sound" / "x.mindrecord", 3)
    files = sorted(path.name for path in first.parent.iterdir())
    whole = len(open_mindrecord(first.parent))
    kinds = st.sampled_from(["remove", "empty", "cut", "swap"])

    def check(changes):
        place = tmp_path / "set"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(first.parent, place)
        for name, kind, other, size in changes:
            path = place / name
            if kind == "remove":
                path.unlink(missing_ok=True)
            elif kind == "swap":
                shutil.copy(first.parent / other, path)
            else:
                data = path.read_bytes() if path.exists() else b""
                path.write_bytes(data[: size if kind == "cut" else 0])
        rows = rows_or_errors(place)
        assert rows is None or len(rows) == whole or any(kind == "swap" for _, kind, _, _ in changes)

    change = st.tuples(st.sampled_from(files), kinds, st.sampled_from(files), st.integers(0, 60_000))
    try_all(count, st.lists(change, min_size=1, max_size=3), check)


@short_and_long(30, 500)
def test_batches_of_damaged_data(tmp_path, count):
    """What a run sees of changed token ids: those outside the vocabulary are refused, not looked up."""
    path = write_small(tmp_path / "x.mindrecord", ids=(0, 10**6), labels=700)
    content = path.read_bytes()

    def batches():
        stream = BatchStream(open_mindrecord(path), batch_size=4, pad_id=0, vocab_size=10**6)
        return [batch for step in stream.steps(prefetch=0) for batch in step]

    assert len(batches()) == 3

    def check(drawn):
        position, piece = drawn
        data = bytearray(content)
        data[position : position + len(piece)] = piece
        path.write_bytes(data)
        for batch in result_or_error(batches, "row") or ():
            assert batch.input_ids.min() >= 0 and batch.input_ids.max() < 10**6
            assert batch.labels.min() >= -100 and batch.labels.max() < 10**6

    places = st.integers(HEADER, len(content) - 8)
    try_all(count, st.tuples(places, st.binary(min_size=1, max_size=8)), check)
