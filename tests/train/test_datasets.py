"""Protects: rows end where the data's own padding begins, whatever the model's padding id is."""

import json

import pytest

from msft.config.schema_data import Dataset
from msft.errors import InputError
from msft.train.datasets import check_made_for, recorded_pad_id


def test_the_padding_id_comes_from_the_report_beside_the_data(tmp_path):
    block = Dataset(data_loader={"type": "MindDataset", "dataset_dir": str(tmp_path / "x.mindrecord")})
    assert recorded_pad_id(block) is None
    (tmp_path / "x.mindrecord.report.json").write_text(json.dumps({"pad_id": 7, "rows": {}}))
    assert recorded_pad_id(block) == 7


def test_data_for_another_kind_of_model_is_refused(tmp_path):
    """Rows of a decoder have no source; those of an encoder-decoder would be read as one text."""
    block = Dataset(data_loader={"type": "MindDataset", "dataset_dir": str(tmp_path / "x.mindrecord")})
    check_made_for(block, "train_dataset", "r.yaml:3", 0)
    report = tmp_path / "x.mindrecord.report.json"
    report.write_text(json.dumps({"dataset_type": "qa", "decoder_start_id": 0}))
    check_made_for(block, "train_dataset", "r.yaml:3", 0)
    with pytest.raises(InputError, match="r.yaml:3: train_dataset: the data was made for an encoder-decoder, sources"):
        check_made_for(block, "train_dataset", "r.yaml:3", None)
    report.write_text(json.dumps({"dataset_type": "qa"}))
    check_made_for(block, "train_dataset", "r.yaml:3", None)
    with pytest.raises(InputError, match="the data was made for a decoder alone"):
        check_made_for(block, "train_dataset", "r.yaml:3", 0)
