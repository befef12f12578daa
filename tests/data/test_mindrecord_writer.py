"""MindSpore reads what we write, byte for byte what it writes itself; a failed write leaves everything as it was."""

import os
import resource
import sqlite3
import tracemalloc

import numpy as np
import pytest

from msft import files
from msft.data.mindrecord import MindRecordWriter, open_mindrecord, shard_writer
from msft.errors import InputError, RunError

COLUMNS = {"input_ids": "int32", "labels": "int32"}


def token_rows(count, length=300, seed=0):
    random = np.random.default_rng(seed)
    limits = 10 ** random.integers(1, 9, (count, length))
    ids = random.integers(-limits, limits).astype(np.int32)
    return [{"input_ids": row, "labels": row[::-1][: length // 2].copy()} for row in ids]


def write(path, rows, columns=COLUMNS, **settings):
    with MindRecordWriter(path, columns, **settings) as writer:
        for row in rows:
            writer.write(row)


def assert_rows(dataset, rows):
    assert len(dataset) == len(rows)
    for index, row in enumerate(rows):
        for name, values in row.items():
            np.testing.assert_array_equal(dataset.row(index)[name], values, strict=True)


def minddataset(paths, **settings):
    dataset = pytest.importorskip("mindspore.dataset")
    rows = dataset.MindDataset(paths, **settings).create_dict_iterator(num_epochs=1, output_numpy=True)
    return list(rows)


@pytest.mark.parametrize(
    "columns",
    [COLUMNS, {"ids": "int64"}, {"b": "float64", "a": "int32", "c": "float32", "d": "int64"}, {"x": "float32"}],
)
def test_files_equal_filewriter_s(tmp_path, columns):
    """Same bytes in the data file, same tables and lines in the index."""
    mindrecord = pytest.importorskip("mindspore.mindrecord")
    random = np.random.default_rng(0)
    rows = [
        {name: (random.standard_normal(number + 1) * 40000).astype(kind) for name, kind in columns.items()}
        for number in range(50)
    ]
    ours, theirs = tmp_path / "ours" / "x.mindrecord", tmp_path / "theirs" / "x.mindrecord"
    write(ours, rows, columns, description="für alle")
    theirs.parent.mkdir()
    writer = mindrecord.FileWriter(str(theirs))
    writer.add_schema({name: {"type": kind, "shape": [-1]} for name, kind in columns.items()}, "für alle")
    writer.write_raw_data(rows)
    writer.commit()
    assert ours.read_bytes() == theirs.read_bytes()
    for query in (
        "SELECT * FROM INDEXES",
        "SELECT * FROM SHARD_NAME",
        "SELECT type, name, tbl_name FROM sqlite_master",
        "SELECT name, type, pk FROM pragma_table_info('INDEXES')",
    ):
        lines = [sqlite3.connect(f"{path}.db").execute(query).fetchall() for path in (ours, theirs)]
        assert lines[0] == lines[1]


def test_minddataset_reads_many_pages(tmp_path, monkeypatch):
    """Blob pages fill up every few rows, raw pages now and then; rows come back in order from both readers."""
    monkeypatch.setattr(shard_writer, "PAGE_SIZE", 1 << 15)
    path, rows = tmp_path / "x.mindrecord", token_rows(3000, length=30)
    rows[1500:1500] = token_rows(60, length=3000)
    write(path, rows)
    dataset = open_mindrecord(path)
    assert len(dataset._files[0].header.raw_pages) == 2 and len(dataset._files[0].header.pages) > 10
    assert_rows(dataset, rows)
    theirs = minddataset(str(path), shuffle=False)
    assert len(theirs) == len(rows)
    for row, expected in zip(theirs, rows, strict=True):
        for name, values in expected.items():
            np.testing.assert_array_equal(row[name], values, strict=True)
    (tmp_path / "x.mindrecord.db").unlink()
    assert_rows(open_mindrecord(path), rows)


@pytest.mark.parametrize("count", [2, 25])
def test_minddataset_reads_shards(tmp_path, count):
    """Row i goes to shard i % 3; a shard may stay empty; several workers see disjoint rows that make up the whole."""
    rows = token_rows(count)
    write(tmp_path / "x.mindrecord", rows, shards=3)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        f"x.mindrecord{number}{suffix}" for number in range(3) for suffix in ("", ".db")
    )
    order = [row for first in range(3) for row in rows[first::3]]
    assert_rows(open_mindrecord(tmp_path / "x.mindrecord0"), order)
    theirs = minddataset(str(tmp_path / "x.mindrecord0"), shuffle=False)
    assert [row["input_ids"].tobytes() for row in theirs] == [row["input_ids"].tobytes() for row in order]
    if count > 2:
        halves = [minddataset(str(tmp_path / "x.mindrecord0"), num_shards=2, shard_id=i) for i in range(2)]
        seen = {row["input_ids"].tobytes() for half in halves for row in half}
        assert seen == {row["input_ids"].tobytes() for row in rows}


def test_files_can_be_listed_with_filewriter_s(tmp_path):
    """MindDataset refuses a list of files whose header or page sizes differ."""
    mindrecord = pytest.importorskip("mindspore.mindrecord")
    rows = token_rows(7)
    write(tmp_path / "ours.mindrecord", rows)
    writer = mindrecord.FileWriter(str(tmp_path / "theirs.mindrecord"))
    writer.add_schema({name: {"type": kind, "shape": [-1]} for name, kind in COLUMNS.items()}, "")
    writer.write_raw_data(rows)
    writer.commit()
    assert len(minddataset([str(tmp_path / "ours.mindrecord"), str(tmp_path / "theirs.mindrecord")])) == 14


def test_mindspore_appends_to_our_file(tmp_path):
    mindrecord = pytest.importorskip("mindspore.mindrecord")
    path, rows = tmp_path / "x.mindrecord", token_rows(20)
    write(path, rows[:10])
    writer = mindrecord.FileWriter.open_for_append(str(path))
    writer.write_raw_data(rows[10:])
    writer.commit()
    assert_rows(open_mindrecord(path), rows)


def test_nothing_is_visible_before_the_end_and_nothing_stays_after_an_error(tmp_path):
    path, old, new = tmp_path / "x.mindrecord", token_rows(5), token_rows(9, seed=1)
    write(path, old)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(KeyError), MindRecordWriter(path, COLUMNS) as writer:
        for row in new:
            writer.write(row)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.suffix != ".part"}.items() >= (
            before.items()
        )
        raise KeyError("the caller's own failure")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    write(path, new)
    assert_rows(open_mindrecord(path), new)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("failing", range(6))
def test_a_crash_while_publishing_never_pairs_data_with_another_index(tmp_path, monkeypatch, shards, failing):
    """After any number of the removals and renames a reader finds the old rows, the new rows, or an error."""
    path, old, new = tmp_path / "x.mindrecord", token_rows(8), token_rows(8, seed=1)
    for row in new:
        row["input_ids"] = row["input_ids"][:-3]
    write(path, old, shards=shards)
    calls = []

    def dying(original):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) > failing:
                raise SystemExit("killed")
            return original(*arguments)

        return call

    monkeypatch.setattr(MindRecordWriter, "_discard", lambda self: [shard.close() for shard in self._shards])
    monkeypatch.setattr(files, "remove", dying(files.remove))
    monkeypatch.setattr(os, "replace", dying(os.replace))
    try:
        write(path, new, shards=shards)
    except SystemExit:
        pass
    monkeypatch.undo()
    target = tmp_path / ("x.mindrecord" if shards == 1 else "x.mindrecord0")
    try:
        dataset = open_mindrecord(target)
    except InputError:
        return
    found = [dataset.row(index)["input_ids"].tobytes() for index in range(len(dataset))]
    in_order = [[row["input_ids"].tobytes() for i in range(shards) for row in rows[i::shards]] for rows in (old, new)]
    assert found in in_order


def test_a_set_of_another_size_is_not_mixed_with_the_new_one(tmp_path):
    path = tmp_path / "x.mindrecord"
    write(path, token_rows(6), shards=3)
    for shards in (1, 2):
        with pytest.raises(InputError, match="x.mindrecord[02]: left from a set with another number of shards"):
            write(path, token_rows(6), shards=shards)
    write(tmp_path / "data", token_rows(2))
    write(tmp_path / "data1", token_rows(2))
    write(tmp_path / "data", token_rows(3))
    assert len(open_mindrecord(tmp_path / "data1")) == 2


@pytest.mark.parametrize(
    "row, message",
    [
        ({"input_ids": np.zeros(3, np.int32)}, "row 1: has columns"),
        ({"input_ids": np.zeros((3, 1), np.int32), "labels": np.zeros(3, np.int32)}, "shape"),
        ({"input_ids": np.zeros(0, np.int32), "labels": np.zeros(3, np.int32)}, "row 1: column 'input_ids' is empty"),
        ({"input_ids": np.array([2**31]), "labels": np.zeros(3, np.int32)}, "row 1: column 'input_ids' of dtype int64"),
        ({"input_ids": np.zeros(3), "labels": np.zeros(3, np.int32)}, "float64 does not fit int32"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path / "x.mindrecord", [*token_rows(1), row])
    assert not list(tmp_path.iterdir())


def test_integers_that_fit_are_cast(tmp_path):
    write(tmp_path / "x.mindrecord", [{"input_ids": np.arange(3), "labels": np.arange(3, dtype=np.uint8)}])
    assert open_mindrecord(tmp_path / "x.mindrecord").row(0)["labels"].dtype == np.int32


@pytest.mark.parametrize(
    "columns, shards, message",
    [
        ({}, 1, "at least one column"),
        ({"a b": "int32"}, 1, "column name 'a b'"),
        ({"a": "int8"}, 1, "type 'int8' is not one of int32"),
        (COLUMNS, 0, "0 shards"),
    ],
)
def test_settings_that_mindrecord_does_not_allow(tmp_path, columns, shards, message):
    with pytest.raises(InputError, match=message):
        MindRecordWriter(tmp_path / "x.mindrecord", columns, shards)


def test_no_rows_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no row was written"):
        write(tmp_path / "x.mindrecord", [])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_run_error_and_leaves_nothing(tmp_path):
    """A file size limit makes the system refuse the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (17 << 20, hard))
    try:
        with pytest.raises(RunError, match="x.mindrecord: File too large"):
            write(tmp_path / "x.mindrecord", token_rows(600, length=4000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """40 MB of rows pass through the writer and the reader; neither holds 4 MB at any time."""
    row = token_rows(1, length=20000)[0]
    tracemalloc.start()
    write(tmp_path / "x.mindrecord", [row] * 500)
    dataset = open_mindrecord(tmp_path / "x.mindrecord")
    for index in range(len(dataset)):
        dataset.row(index)
    dataset.digest()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
