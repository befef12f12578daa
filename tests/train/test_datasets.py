"""The columns of the data: what is supervised when labels are left out, absent columns."""

import numpy as np
import pytest

from msft.config.schema_data import Dataset
from msft.errors import InputError
from msft.train import datasets
from tests.conftest import counting_rows, write_rows


def block(path, columns=("input_ids", "labels")):
    return Dataset.model_validate({"data_loader": {"dataset_dir": str(path)}, "input_columns": list(columns)})


def test_labels_left_out_supervise_every_token_but_padding(tiny_data, capsys):
    rows = datasets.open_rows(block(tiny_data[0], ["input_ids"]), "train_dataset", "r.yaml:9", 0)
    assert "every token except padding is supervised" in capsys.readouterr().err
    for index, stored in enumerate(counting_rows(48, seed=1)):
        row = rows.row(index)
        assert np.array_equal(row["input_ids"], stored["input_ids"])
        assert np.array_equal(row["labels"], np.where(stored["input_ids"] == 0, -100, stored["input_ids"]))
    assert rows.digest() == datasets.open_rows(block(tiny_data[0]), "train_dataset", "r.yaml:9", 0).digest()


def test_a_pad_id_inside_the_text_stays_supervised(tmp_path):
    ids = np.array([5, 0, 6, 0, 0], np.int32)
    path = write_rows(tmp_path / "x.mindrecord", [{"input_ids": ids, "labels": ids}])
    rows = datasets.open_rows(block(path, ["input_ids"]), "train_dataset", "r.yaml", 0)
    assert rows.row(0)["labels"].tolist() == [5, 0, 6, -100, -100]


def test_data_without_labels_is_supervised_wholly(tmp_path, capsys):
    from msft.data.mindrecord import MindRecordWriter

    with MindRecordWriter(tmp_path / "wiki.mindrecord", {"input_ids": "int32"}) as writer:
        writer.write({"input_ids": np.array([5, 6, 0], np.int32)})
    rows = datasets.open_rows(block(tmp_path / "wiki.mindrecord"), "train_dataset", "r.yaml", 0)
    assert rows.columns == ("input_ids",) and "every token is supervised" in capsys.readouterr().err


def test_an_absent_column_is_named_with_the_nearest(tiny_data):
    with pytest.raises(InputError, match=r"r.yaml:9: train_dataset.input_columns.*'label', did you mean 'labels'\?"):
        datasets.open_rows(block(tiny_data[0], ["input_ids", "label"]), "train_dataset", "r.yaml:9", 0)
