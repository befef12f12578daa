"""Damaged, foreign and crafted MindRecord files: one error naming the file; no traceback, hang or big allocation."""

import json
import shutil
import sqlite3
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest

from msft.data.mindrecord import MindRecordWriter, open_mindrecord
from msft.errors import InputError
from tests.data.small_mindrecord import ROWS, write_small


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small") / "x.mindrecord")


@pytest.fixture
def copy(small, tmp_path):
    for file in (small, small.with_name(small.name + ".db")):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path / small.name


@contextmanager
def bounded_memory(limit=32 << 20):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def read_everything(path):
    dataset = open_mindrecord(path)
    return [dataset.row(index) for index in range(len(dataset))]


def fails(path, message):
    """Reading everything must end in InputErrors whose lines all begin with the file's name and have no line break."""
    with bounded_memory(), pytest.raises(InputError, match=message) as caught:
        read_everything(path)
    for problem in caught.value.problems:
        assert problem.startswith(str(path)) and "\n" not in problem


def header_of(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def replace_header(path, document):
    text = json.dumps(document).encode()
    data = bytearray(path.read_bytes())
    data[: 8 + len(text)] = len(text).to_bytes(8, "little") + text
    path.write_bytes(data)


def test_the_sample_is_whole(copy):
    assert len(read_everything(copy)) == ROWS and len(header_of(copy)["page"]) == 3


def test_every_truncation_is_found_when_opening(copy):
    data = copy.read_bytes()
    for size in [*range(0, 40), *range(40, len(data), 997), len(data) - 1]:
        copy.write_bytes(data[:size])
        with pytest.raises(InputError, match="truncated|not a MindRecord"):
            open_mindrecord(copy)


def test_files_of_other_kinds(copy):
    for content in (b"", b"PK\x03\x04" + bytes(100), b"[]" * 100, bytes(1000), b"\xff" * 1000):
        copy.write_bytes(content)
        fails(copy, "not a MindRecord file")
    copy.write_bytes((5).to_bytes(8, "little") + b"[1,2]" + bytes(100))
    fails(copy, "not a MindRecord header")
    copy.write_bytes((20000).to_bytes(8, "little") + b"[" * 20000)
    fails(copy, "no JSON header")
    copy.write_bytes(bytes([255]) * 500 + b"AES-GCMENCRYPT")
    fails(copy, "encrypted")


def test_missing_and_unreadable_paths(tmp_path, copy):
    with pytest.raises(InputError, match="y.mindrecord: no such file, did you mean 'x.mindrecord'"):
        open_mindrecord(tmp_path / "y.mindrecord")
    with pytest.raises(InputError, match="nowhere: no such file"):
        open_mindrecord(tmp_path / "no" / "nowhere")
    with pytest.raises(InputError, match="no file matches"):
        open_mindrecord(tmp_path / "*.tfrecord")
    with pytest.raises(InputError, match="no MindRecord file was given"):
        open_mindrecord([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no \\*.mindrecord file"):
        open_mindrecord(tmp_path / "empty")
    with pytest.raises(InputError) as caught:
        open_mindrecord([tmp_path / "a.mindrecord", copy, tmp_path / "b.mindrecord"])
    assert len(caught.value.problems) == 2


def test_all_bad_files_are_reported_at_once(copy):
    for name in ("a.mindrecord", "b.mindrecord"):
        copy.with_name(name).write_bytes(b"nonsense" * 10)
    with pytest.raises(InputError) as caught:
        open_mindrecord([copy.with_name("a.mindrecord"), copy, copy.with_name("b.mindrecord")])
    assert len(caught.value.problems) == 2


def test_files_with_other_columns_do_not_mix(copy):
    other = copy.with_name("other.mindrecord")
    with MindRecordWriter(other, {"chosen": "int32"}) as writer:
        writer.write({"chosen": np.arange(3, dtype=np.int32)})
    with pytest.raises(InputError, match="other.mindrecord: its columns \\(chosen\\) are not those of .*x.mindrecord"):
        open_mindrecord([copy, other])


@pytest.mark.parametrize("name", ["../x.mindrecord", "/etc/passwd", "..", "", "a\\b", 7, "a\0b"])
def test_shard_names_stay_inside_their_folder(copy, name):
    document = header_of(copy)
    document["shard_addresses"] = ["x.mindrecord", name]
    replace_header(copy, document)
    fails(copy, "is not a plain file name")


def test_a_missing_shard(copy):
    document = header_of(copy)
    document["shard_addresses"] = ["x.mindrecord", "x.mindrecord1"]
    replace_header(copy, document)
    for path in (copy, copy.parent):
        with pytest.raises(InputError, match="x.mindrecord1: missing; x.mindrecord belongs to 2 shards"):
            open_mindrecord(path)


@pytest.mark.parametrize("version", ["1.0", "4.0", None, 3])
def test_versions(copy, version):
    document = header_of(copy)
    document["version"] = version
    replace_header(copy, document)
    fails(copy, "version .* is not supported \\(known: 2.0, 3.0\\)")


HUGE = 1 << 60


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.update(header_size=HUGE), "out of range"),
        (lambda d: d.update(page_size=0), "out of range"),
        (lambda d: d.update(page_size=-1), "not a count"),
        (lambda d: d.update(page_size=True), "not a count"),
        (lambda d: d["page"][0].update(end_row_id=HUGE), "claims rows"),
        (lambda d: d["page"][0].update(start_row_id=1), "claims rows"),
        (lambda d: d["page"][0].update(page_id=HUGE), "truncated: page"),
        (lambda d: d["page"][0].update(page_id=1), "overlaps"),
        (lambda d: d["page"][0].update(page_size=HUGE), "overlaps"),
        (lambda d: d["page"][0].update(page_type="OTHER"), "unknown type 'OTHER'"),
        (lambda d: d["page"].pop(0), "claims rows"),
        (lambda d: d["page"].pop(2), "claims rows|does not match"),
        (lambda d: d["page"].pop(1), "does not match|truncated"),
        (lambda d: d.pop("schema"), "KeyError 'schema'"),
        (lambda d: d.update(schema=[]), "0 schemas"),
        (lambda d: d["schema"][0].update(blob_fields=["labels"]), "blob_fields"),
        (lambda d: d["schema"][0]["schema"]["labels"].update(type="object"), "unknown type 'object'"),
        (lambda d: d["schema"][0]["schema"]["labels"].update(shape=[-1, -1]), "cannot have shape"),
        (lambda d: d["schema"][0]["schema"]["labels"].update(shape=[HUGE, -1]), "500 elements for shape"),
        (lambda d: d["schema"][0]["schema"]["labels"].update(type="int64"), "bytes"),
    ],
)
def test_headers_that_contradict_the_file(copy, change, message):
    document = header_of(copy)
    change(document)
    replace_header(copy, document)
    if message != "bytes":
        fails(copy, message)
    else:
        assert read_everything(copy)[0]["labels"].dtype == np.int64


def test_an_index_of_another_file(copy):
    database = copy.with_name("x.mindrecord.db")
    for rows, message in ((5, "it indexes 5 rows, the file has 12"), (ROWS, "does not match|its index says")):
        other = copy.with_name("other.mindrecord")
        with MindRecordWriter(other, {"input_ids": "int32", "labels": "int32"}) as writer:
            for number in range(rows):
                ids = np.arange(number + 1, dtype=np.int32)
                writer.write({"input_ids": ids, "labels": ids})
        shutil.copy(other.with_name("other.mindrecord.db"), database)
        fails(copy, message)


@pytest.mark.parametrize(
    "statements, message",
    [
        (["DROP TABLE INDEXES"], "no table INDEXES"),
        (["DELETE FROM INDEXES WHERE ROW_ID = 3"], "no valid entry for row 3"),
        (["UPDATE INDEXES SET PAGE_OFFSET_BLOB = 'x' WHERE ROW_ID = 4"], "no valid entry for row 4"),
        (["UPDATE INDEXES SET PAGE_OFFSET_BLOB_END = 1 << 50 WHERE ROW_ID = 5"], "outside its pages"),
        (["UPDATE INDEXES SET PAGE_ID_BLOB = 1 WHERE ROW_ID = 6"], "outside its pages"),
        (["UPDATE INDEXES SET PAGE_OFFSET_BLOB = PAGE_OFFSET_BLOB + 1 WHERE ROW_ID = 7"], "row 7: its index says"),
        (
            [
                "UPDATE INDEXES SET (PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END, PAGE_OFFSET_RAW, PAGE_OFFSET_RAW_END) ="
                " (SELECT PAGE_OFFSET_BLOB, PAGE_OFFSET_BLOB_END, PAGE_OFFSET_RAW, PAGE_OFFSET_RAW_END FROM INDEXES"
                " WHERE ROW_ID = 2) WHERE ROW_ID = 4"
            ],
            "row 4: its index says bytes .* are due",
        ),
        (["UPDATE INDEXES SET ROW_ID = 99 WHERE ROW_ID = 11"], "it indexes 100 rows"),
        (
            [
                "DROP TABLE INDEXES",
                "CREATE VIEW INDEXES AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)"
                " SELECT x AS ROW_ID FROM n",
            ],
            "no table INDEXES",
        ),
        (
            [
                "ALTER TABLE INDEXES RENAME TO OLD",
                "CREATE TABLE INDEXES(ROW_ID INT)",
                "INSERT INTO INDEXES SELECT 11 FROM OLD a, OLD b, OLD c, OLD d, OLD e",
            ],
            "damaged|no valid entry",
        ),
    ],
)
def test_a_crafted_index(copy, statements, message):
    with sqlite3.connect(copy.with_name("x.mindrecord.db")) as database:
        for statement in statements:
            database.execute(statement)
    database.close()
    fails(copy, message)


def test_a_file_that_changes_under_the_reader(copy):
    dataset = open_mindrecord(copy)
    with open(copy, "r+b") as file:
        file.truncate(20000)
    with pytest.raises(InputError, match="x.mindrecord row 11: its index says"):
        dataset.row(11)
    with pytest.raises(InputError, match="x.mindrecord: truncated at byte"):
        dataset.digest()


def test_row_numbers_out_of_range(copy):
    for index in (-1, ROWS):
        with pytest.raises(IndexError):
            open_mindrecord(copy).row(index)
