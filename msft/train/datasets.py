"""The MindRecord data of a run, with the columns that the recipe chooses."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from msft import console
from msft.backend.contract import IGNORE
from msft.config.schema_data import Dataset
from msft.convert.hf_folder import read_json
from msft.data.dataset import RowDataset
from msft.data.mindrecord import open_mindrecord
from msft.errors import InputError, did_you_mean


class EveryTokenSupervised:
    """A dataset whose labels are its `input_ids`; padding at the end, if any, is not supervised."""

    columns = ("input_ids", "labels")

    def __init__(self, dataset: RowDataset, pad_id: int):
        self.dataset, self.pad_id = dataset, pad_id

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Return one row with the labels made from its ids."""
        ids = self.dataset.row(index)["input_ids"]
        real = np.flatnonzero(ids != self.pad_id)
        labels = ids.astype(np.int32)
        labels[real[-1] + 1 if len(real) else 0 :] = IGNORE
        return {"input_ids": ids, "labels": labels}

    def ends(self, fillers: Mapping[str, int | None]) -> Iterator[np.ndarray]:
        """Yield the rows' ends (RowDataset.ends): the labels end where the ids do."""
        return self.dataset.ends({"input_ids": self.pad_id})

    def digest(self) -> str:
        """Return the digest of the rows as they are stored."""
        return self.dataset.digest()


def paths_of(block: Dataset) -> list[str]:
    """Return the files and folders that a dataset block names."""
    loader = block.data_loader
    return [loader.dataset_dir] if loader.dataset_dir else list(loader.dataset_files)


def recorded_pad_id(block: Dataset) -> int | None:
    """Return the padding id that `llama_preprocess` noted in the report beside the data, None where there is none."""
    pad_id = _recorded(block, "pad_id")
    return pad_id if isinstance(pad_id, int) else None


def recorded_template(block: Dataset) -> str | None:
    """Return the template that the data was made with, as the report beside it says; None where there is none."""
    template = _recorded(block, "template")
    return template if isinstance(template, str) else None


def check_made_for(block: Dataset, name: str, where: str, start_id: int | None) -> None:
    """Raise InputError for data that `llama_preprocess` has made for another kind of model, as the report says.

    `start_id` is the start token of an encoder-decoder, None for a decoder.
    """
    if _recorded(block, "dataset_type") is None or _recorded(block, "decoder_start_id") == start_id:
        return
    other = "for a decoder alone" if start_id is not None else "for an encoder-decoder, sources and answers apart"
    raise InputError(
        f"{where}: {name}: the data was made {other} (its report.json says so); make it anew with the folder of this "
        "model as --model_file"
    )


def _recorded(block: Dataset, key: str) -> Any:
    for path in paths_of(block):
        report = Path(f"{path}.report.json")
        if report.is_file():
            return read_json(report).get(key)
    return None


def open_rows(block: Dataset, name: str, where: str, pad_id: int) -> RowDataset:
    """Open the data of the recipe's block `name`; what is done with the columns is said.

    `where` is the place of the block in the recipe. Raises InputError for damaged files and absent columns.
    """
    paths = paths_of(block)
    dataset = open_mindrecord(paths if len(paths) > 1 else paths[0])
    absent = [column for column in block.input_columns if column not in (*dataset.columns, "labels")]
    if "input_ids" not in dataset.columns or absent:
        missing = ", ".join(f"{column!r}{did_you_mean(column, dataset.columns)}" for column in absent or ["input_ids"])
        known = ", ".join(dataset.columns)
        raise InputError(f"{where}: {name}.input_columns: the data has no column {missing} (it has {known})")
    unused = [column for column in dataset.columns if column not in ("input_ids", "labels")]
    if unused:
        console.note(f"{name}: columns without use here: {', '.join(unused)}")
    if "labels" not in dataset.columns:
        console.note(f"{name}: the data has no labels, so every token is supervised")
        return dataset
    if "labels" not in block.input_columns:
        console.note(f"{name}: input_columns leaves labels out, so every token except padding is supervised")
        return EveryTokenSupervised(dataset, pad_id)
    return dataset
