"""MindFormers' data pipeline must see exactly the rows we wrote, in our order and number."""

import mindformers_recipe
import numpy as np
import pytest

from msft.data.mindrecord import MindRecordWriter, open_mindrecord

pytestmark = pytest.mark.mindformers


def rows_there(oracle, data, folder):
    recipe = mindformers_recipe.write(folder / "r.yaml", "finetune", data, folder / "none.ckpt", folder / "out")
    oracle("rows.py", recipe, folder / "rows.npz")
    return np.load(folder / "rows.npz")


def assert_same_rows(theirs, data):
    ours = [open_mindrecord(data).row(number) for number in range(10)]
    for column in ("input_ids", "labels"):
        assert theirs[column].dtype == np.int32
        np.testing.assert_array_equal(theirs[column], np.stack([row[column] for row in ours]))


def test_mindformers_reads_our_rows(oracle, records, tmp_path):
    assert_same_rows(rows_there(oracle, records, tmp_path), records)


def test_mindformers_reads_our_shards_from_their_folder(oracle, records, tmp_path):
    source, folder = open_mindrecord(records), tmp_path / "shards"
    folder.mkdir()
    columns = dict.fromkeys(("input_ids", "labels"), "int32")
    with MindRecordWriter(folder / "train.mindrecord", columns, shards=3) as writer:
        for number in range(len(source)):
            writer.write(source.row(number))
    assert_same_rows(rows_there(oracle, folder, tmp_path), folder)
