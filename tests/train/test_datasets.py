"""Protects: rows end where the data's own padding begins, whatever the model's padding id is."""

import json

from msft.config.schema_data import Dataset
from msft.train.datasets import recorded_pad_id


def test_the_padding_id_comes_from_the_report_beside_the_data(tmp_path):
    block = Dataset(data_loader={"type": "MindDataset", "dataset_dir": str(tmp_path / "x.mindrecord")})
    assert recorded_pad_id(block) is None
    (tmp_path / "x.mindrecord.report.json").write_text(json.dumps({"pad_id": 7, "rows": {}}))
    assert recorded_pad_id(block) == 7
