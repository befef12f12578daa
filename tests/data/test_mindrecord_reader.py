"""The reader gives what MindSpore's own readers give, on files that MindSpore wrote."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from msft.data.mindrecord import MindRecordWriter, open_mindrecord
from msft.errors import InputError

pytest.importorskip("mindspore")
from mindspore.dataset import MindDataset  # noqa: E402
from mindspore.mindrecord import FileReader, FileWriter  # noqa: E402

TOKENS = {"input_ids": {"type": "int32", "shape": [-1]}, "labels": {"type": "int32", "shape": [-1]}}
EVERYTHING = {
    "count": {"type": "int32"},
    "big": {"type": "int64"},
    "single": {"type": "float32"},
    "double": {"type": "float64"},
    "text": {"type": "string"},
    "blob": {"type": "bytes"},
    "int32s": {"type": "int32", "shape": [-1]},
    "int64s": {"type": "int64", "shape": [2, -1]},
    "float32s": {"type": "float32", "shape": [-1, 3]},
    "float64s": {"type": "float64", "shape": [2]},
}


def write(path, schema, calls, shards=1, page_size=None, index=None):
    """Write with MindSpore: `calls` holds the rows of each call of write_raw_data."""
    writer = FileWriter(str(path), shards, overwrite=True)
    if page_size:
        writer.set_page_size(page_size)
    writer.add_schema(schema, "made by the test")
    if index:
        writer.add_index(index)
    for rows in calls:
        writer.write_raw_data(rows)
    writer.commit()


def token_rows(count, length=300, seed=0):
    random = np.random.default_rng(seed)
    limits = 10 ** random.integers(1, 9, (count, length))
    ids = random.integers(-limits, limits).astype(np.int32)
    return [{"input_ids": row, "labels": row[::-1].copy()} for row in ids]


def every_row(number):
    return {
        "count": -number,
        "big": 10**12 * number,
        "single": number / 3,
        "double": number / 7,
        "text": "é" * number + " end",
        "blob": b"\x00\xff" * (number + 1),
        "int32s": np.arange(-number - 1, number * 200, 7, dtype=np.int32),
        "int64s": np.array([[1, -1, 10**15], [300, -70000, number]], np.int64),
        "float32s": np.full((number + 1, 3), number / 3, np.float32),
        "float64s": np.array([number / 7, -1e300]),
    }


def assert_equals_minddataset(paths, dataset, columns):
    """Every row in order, the columns bit for bit, as MindDataset yields them."""
    expected = MindDataset(paths, sorted(columns), shuffle=False).create_dict_iterator(num_epochs=1, output_numpy=True)
    count = 0
    for index, row in enumerate(expected):
        ours = dataset.row(index)
        for name in columns:
            assert ours[name].dtype == row[name].dtype and ours[name].shape == row[name].shape, name
            assert ours[name].tobytes() == row[name].tobytes(), (index, name)
        count += 1
    assert count == len(dataset)


def test_tokens_over_many_pages_and_calls(tmp_path):
    """Pages of 32 KiB force many row groups; several calls put raw pages between blob pages."""
    path = tmp_path / "x.mindrecord"
    rows = token_rows(120)
    write(path, TOKENS, [rows[:50], rows[50:51], rows[51:]], page_size=1 << 15)
    dataset = open_mindrecord(path)
    assert len(dataset) == 120 and dataset.columns == ("input_ids", "labels")
    for index in np.random.default_rng(1).permutation(120):
        for name, values in rows[index].items():
            np.testing.assert_array_equal(dataset.row(index)[name], values)
    assert_equals_minddataset(str(path), dataset, TOKENS)


@pytest.mark.parametrize("shards", [2, 11])
def test_shards_are_read_as_one_set_whichever_is_named(tmp_path, shards):
    rows = token_rows(40, length=50)
    write(tmp_path / "x.mindrecord", TOKENS, [rows], shards=shards)
    first = tmp_path / ("x.mindrecord00" if shards > 10 else "x.mindrecord0")
    by_file, by_name = open_mindrecord(first), open_mindrecord(tmp_path / "x.mindrecord")
    by_folder, by_pattern = open_mindrecord(tmp_path), open_mindrecord(tmp_path / "x.mindrecord*")
    assert_equals_minddataset(str(first), by_file, TOKENS)
    assert by_file.paths == by_name.paths == by_folder.paths == by_pattern.paths
    assert by_file.digest() == by_folder.digest()


def test_a_list_means_exactly_its_files(tmp_path):
    rows = token_rows(9, length=20)
    write(tmp_path / "x.mindrecord", TOKENS, [rows], shards=3)
    write(tmp_path / "y.mindrecord", TOKENS, [rows[:2]])
    files = [str(tmp_path / name) for name in ("y.mindrecord", "x.mindrecord2", "x.mindrecord0")]
    assert_equals_minddataset(files, open_mindrecord(files), TOKENS)


def test_every_type_with_and_without_shape(tmp_path):
    """Numbers, strings and arrays equal MindDataset's; bytes equal what was written (MindDataset cuts at NUL)."""
    path, rows = tmp_path / "all.mindrecord", [every_row(number) for number in range(30)]
    write(path, EVERYTHING, [rows], shards=2, page_size=1 << 15, index=["count", "text"])
    dataset = open_mindrecord(path)
    by_count = {int(dataset.row(index)["count"]): dataset.row(index) for index in range(30)}
    assert [bytes(by_count[-number]["blob"]) for number in range(30)] == [row["blob"] for row in rows]
    assert_equals_minddataset(str(path) + "0", dataset, set(EVERYTHING) - {"blob"})


@pytest.mark.parametrize(
    "schema",
    [
        {"only": {"type": "int64", "shape": [-1]}},
        {"only": {"type": "float32", "shape": [-1]}},
        {"a": {"type": "float32", "shape": [-1]}, "b": {"type": "float64", "shape": [-1]}},
        {"number": {"type": "int32"}, "text": {"type": "string"}},
        {"number": {"type": "float64"}},
    ],
)
def test_files_of_one_kind_of_column(tmp_path, schema):
    """A lone column has no size in front; without integer arrays nothing is compressed; scalars alone have no blob."""

    def value(field, number):
        if field["type"] == "string":
            return f"row {number}"
        values = np.arange(number + 1, dtype=field["type"]) * 77 - 30
        return values if "shape" in field else values[-1].item()

    path = tmp_path / "x.mindrecord"
    rows = [{name: value(field, number) for name, field in schema.items()} for number in range(40)]
    write(path, schema, [rows])
    assert_equals_minddataset(str(path), open_mindrecord(path), schema)
    reader = FileReader(str(path))
    for index, row in enumerate(reader.get_next()):
        for name, values in row.items():
            np.testing.assert_array_equal(open_mindrecord(path).row(index)[name], values)
    reader.close()


def test_an_empty_array_is_empty(tmp_path):
    """MindDataset yields one uninitialised element instead; FileReader yields what was written."""
    path = tmp_path / "x.mindrecord"
    write(path, TOKENS, [[{"input_ids": np.zeros(0, np.int32), "labels": np.arange(3, dtype=np.int32)}]])
    row = open_mindrecord(path).row(0)
    assert row["input_ids"].shape == (0,) and row["labels"].tolist() == [0, 1, 2]


def test_appended_rows(tmp_path):
    path, rows = tmp_path / "x.mindrecord", token_rows(30)
    write(path, TOKENS, [rows[:10]])
    writer = FileWriter.open_for_append(str(path))
    writer.write_raw_data(rows[10:])
    writer.commit()
    assert_equals_minddataset(str(path), open_mindrecord(path), TOKENS)


def test_without_the_db_rows_are_found_by_walking(tmp_path, capsys):
    path, rows = tmp_path / "all.mindrecord", [every_row(number) for number in range(30)]
    write(path, EVERYTHING, [rows[:11], rows[11:]], page_size=1 << 15)
    indexed = [open_mindrecord(path).row(index) for index in range(30)]
    (tmp_path / "all.mindrecord.db").unlink()
    dataset = open_mindrecord(path)
    assert "all.mindrecord.db is missing" in capsys.readouterr().err
    for index in reversed(range(30)):
        for name, values in indexed[index].items():
            assert dataset.row(index)[name].tobytes() == values.tobytes()


def test_version_2_integers_are_not_compressed(tmp_path):
    """Before version 3.0 integers stood as they are: a float file is relabelled as such a file of integers."""
    path = tmp_path / "old.mindrecord"
    with MindRecordWriter(path, {"ids": "float32", "more": "float32"}) as writer:
        for number in range(5):
            ids = np.arange(number + 3, dtype=np.int32) * 1000
            writer.write({"ids": ids.view(np.float32), "more": -ids.view(np.float32)})
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b'"float32"', b'"int32"  ').replace(b'"3.0"', b'"2.0"')
    assert len(header) == size and json.loads(header)
    data[8 : 8 + size] = header
    path.write_bytes(data)
    dataset = open_mindrecord(path)
    np.testing.assert_array_equal(dataset.row(4)["ids"], np.arange(7) * 1000)
    assert_equals_minddataset(str(path), dataset, ("ids", "more"))


def test_a_renamed_pair_is_read_and_a_renamed_shard_is_not(tmp_path):
    write(tmp_path / "x.mindrecord", TOKENS, [token_rows(4)])
    write(tmp_path / "y.mindrecord", TOKENS, [token_rows(4)], shards=2)
    shutil.move(tmp_path / "x.mindrecord", tmp_path / "z.mindrecord")
    shutil.move(tmp_path / "x.mindrecord.db", tmp_path / "z.mindrecord.db")
    assert len(open_mindrecord(tmp_path / "z.mindrecord")) == 4
    shutil.move(tmp_path / "y.mindrecord0", tmp_path / "w.mindrecord")
    with pytest.raises(InputError, match="w.mindrecord: renamed; it is one of 2 shards"):
        open_mindrecord(tmp_path / "w.mindrecord")


def test_more_files_than_may_be_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("msft.data.mindrecord.dataset.OPEN_SHARDS", 3)
    rows = token_rows(40, length=10)
    write(tmp_path / "x.mindrecord", TOKENS, [rows], shards=10)
    dataset = open_mindrecord(tmp_path)
    seen = {dataset.row(index)["input_ids"].tobytes() for index in np.random.default_rng(0).permutation(40)}
    assert seen == {row["input_ids"].tobytes() for row in rows}


def test_the_digest_follows_the_content_alone(tmp_path):
    """Equal for renamed and for re-indexed data, different for one changed byte of one row."""
    write(tmp_path / "x.mindrecord", TOKENS, [token_rows(50)], page_size=1 << 15)
    expected = open_mindrecord(tmp_path / "x.mindrecord").digest()
    copy = tmp_path / "other name" / "100% [1]?.mindrecord"
    copy.parent.mkdir()
    shutil.copy(tmp_path / "x.mindrecord", copy)
    assert open_mindrecord(copy).digest() == expected
    shutil.copy(tmp_path / "x.mindrecord.db", f"{copy}.db")
    assert open_mindrecord(copy).digest() == expected and len(open_mindrecord(copy)) == 50
    with open(copy, "r+b") as file:
        file.seek((1 << 24) + 300)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    assert open_mindrecord(copy).digest() != expected


def test_no_framework_is_imported(tmp_path):
    """Writing, reading and batching work where neither framework is installed."""
    program = """
import sys
sys.modules.update(dict.fromkeys(("torch", "mindspore", "transformers", "peft")))
import numpy as np
from msft.data.batches import BatchStream
from msft.data.mindrecord import MindRecordWriter, open_mindrecord
with MindRecordWriter(sys.argv[1], {"input_ids": "int32"}, shards=2) as writer:
    for number in range(8):
        writer.write({"input_ids": np.arange(number, number + 9)})
print(sum(len(batches) for batches in BatchStream(open_mindrecord(sys.argv[1]), batch_size=2, pad_id=0).steps()))
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "x.mindrecord"], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("4\n", "")
