"""Row lengths found in bulk are those that rows have when they are read and aligned, on files of every kind."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msft.backend.contract import IGNORE
from msft.data import lengths
from msft.data.collate import align
from msft.data.dataset import InMemoryDataset
from msft.data.lengths import row_lengths
from msft.data.mindrecord import MindRecordWriter, open_mindrecord, shard_writer
from msft.errors import InputError
from msft.train.datasets import EveryTokenSupervised
from tests.data.small_mindrecord import HEADER, PAGE, write_small

# Of every width that MindRecord stores integers in: 1, 2 and 4 bytes, next to the borders of each.
PADS = (0, 2, 127, 128, 32000, 32768, 128001, 2**31 - 1)


def aligned(dataset, pad_id):
    return [len(align(dataset.row(index), pad_id).input_ids) for index in range(len(dataset))]


def written(path, rows, kind="int32", shards=1):
    """The rows as a MindRecord of small pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "HEADER_SIZE", HEADER)
        patch.setattr(shard_writer, "PAGE_SIZE", PAGE)
        with MindRecordWriter(path, {name: kind for name in rows[0]}, shards) as writer:
            for row in rows:
                writer.write({name: np.asarray(values, kind) for name, values in row.items()})
    return open_mindrecord(path)


def padded_rows(pad, tokens):
    """A row for each list of (token, supervised): its tokens, then padding up to a length that differs."""
    for number, row in enumerate(tokens):
        ids = [pad if token is None else token for token, _ in row]
        labels = [token if supervised else IGNORE for token, (_, supervised) in zip(ids, row, strict=True)]
        yield {"input_ids": ids + [pad] * (number % 7), "labels": labels + [IGNORE] * (number % 7)}


# None stands for the padding id inside the text and before the padding.
TOKEN = st.tuples(st.sampled_from((None, None, 0, 1, 127, 128, 255, 256, 32767, 32768, 65535, 2**24)), st.booleans())


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(PADS),
    st.sampled_from(("int32", "int64")),
    st.lists(st.lists(TOKEN, min_size=1, max_size=9), min_size=1),
)
def test_lengths_are_those_of_aligned_rows(tmp_path_factory, pad, kind, tokens):
    rows = list(padded_rows(pad, tokens))
    dataset = written(tmp_path_factory.mktemp("data") / "x.mindrecord", rows, kind)
    found = row_lengths(dataset, len(rows), pad)
    assert found.tolist() == aligned(dataset, pad) and found.dtype == np.int32
    assert row_lengths(InMemoryDataset(rows), len(rows), pad).tolist() == found.tolist()
    ids_only = EveryTokenSupervised(dataset, pad)
    assert row_lengths(ids_only, len(rows), pad).tolist() == aligned(ids_only, pad)


def test_many_pages_and_shards_and_the_first_rows_only(tmp_path):
    random = np.random.default_rng(0)
    tokens = [[(int(random.integers(0, 40000)), True)] * int(random.integers(0, 900)) for _ in range(120)]
    dataset = written(tmp_path / "x.mindrecord", list(padded_rows(2, tokens)), shards=3)
    expected = aligned(dataset, 2)
    assert row_lengths(dataset, 120, 2).tolist() == expected
    assert row_lengths(dataset, 50, 2).tolist() == expected[:50]
    # Data without labels has no padding: every token counts.
    ids = written(tmp_path / "y.mindrecord", [{"input_ids": [5, 2, 2]}, {"input_ids": [2]}])
    assert row_lengths(ids, 2, 2).tolist() == aligned(ids, 2) == [2, 0]


@pytest.mark.parametrize("pad", [0, 32000, 128001])
def test_files_that_mindspore_wrote(tmp_path, pad):
    pytest.importorskip("mindspore")
    from mindspore.mindrecord import FileWriter

    random = np.random.default_rng(pad)
    tokens = [[(int(random.integers(0, 60000)), True)] * int(random.integers(1, 300)) for _ in range(90)]
    rows = [{name: np.array(values, np.int32) for name, values in row.items()} for row in padded_rows(pad, tokens)]
    writer = FileWriter(str(tmp_path / "x.mindrecord"), 2)
    writer.set_page_size(1 << 15)
    # A column of no use here stands between the two, and makes a part of each row that is stepped over.
    schema = {name: {"type": "int32", "shape": [-1]} for name in ("input_ids", "labels")}
    writer.add_schema({**schema, "attention_mask": {"type": "int64", "shape": [-1]}, "text": {"type": "string"}})
    writer.write_raw_data([{**row, "attention_mask": np.ones(3, np.int64), "text": "a"} for row in rows])
    writer.commit()
    dataset = open_mindrecord(tmp_path / "x.mindrecord")
    assert row_lengths(dataset, 90, pad).tolist() == aligned(dataset, pad)


def test_a_file_without_compression(tmp_path):
    """Of version 2.0: float arrays, which are stored as they are, renamed to integers."""
    path = tmp_path / "x.mindrecord"
    rows = [np.array(values, np.int32) for values in ([7, 8, 2, 2], [2, 2, 2], [9])]
    with MindRecordWriter(path, {"input_ids": "float32"}) as writer:
        for row in rows:
            writer.write({"input_ids": row.view(np.float32)})
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["schema"][0]["schema"]["input_ids"]["type"], header["version"] = "int32", "2.0"
    text = json.dumps(header).encode()
    data[: 8 + len(text)] = len(text).to_bytes(8, "little") + text
    path.write_bytes(data)
    dataset = open_mindrecord(path)
    assert dataset.row(0)["input_ids"].tolist() == [7, 8, 2, 2]
    assert np.concatenate(list(dataset.ends({"input_ids": 2}))).tolist() == [2, 0, 1]
    assert row_lengths(dataset, 3, 2).tolist() == [3, 2, 0]


def test_a_damaged_page_is_named(tmp_path):
    path = write_small(tmp_path / "x.mindrecord")
    data = bytearray(path.read_bytes())
    data[HEADER : HEADER + 8] = (PAGE * 2).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match="x.mindrecord: page 0 is damaged: a column of row 0 ends behind it"):
        row_lengths(open_mindrecord(path), 12, 0)


def test_columns_that_hold_no_token_ids(tmp_path):
    with MindRecordWriter(tmp_path / "x.mindrecord", {"input_ids": "float32"}) as writer:
        writer.write({"input_ids": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="x.mindrecord: column 'input_ids' holds float32, not token ids"):
        row_lengths(open_mindrecord(tmp_path), 1, 0)


def test_a_long_measuring_shows_how_far_it_is_and_is_done_once(tmp_path, monkeypatch, capsys):
    dataset = written(tmp_path / "x.mindrecord", [{"input_ids": [1, 2, 3]}] * 8)
    assert row_lengths(dataset, 8, 0).tolist() == [2] * 8
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(lengths, "PATIENCE", -1)
    row_lengths(dataset, 7, 0)
    told = capsys.readouterr().err
    assert "measuring rows" in told and "7/7" in told
    row_lengths(dataset, 7, 0)
    assert capsys.readouterr().err == ""
