"""Any values under the keys of other toolkits, any dataset_info.json: accepted, or refused with file and key."""

import json

import pytest
from hypothesis import strategies as st

from msft.config.importers import firefly
from msft.config.importers.llama_factory_keys import LlamaFactoryKeys
from msft.config.load import load_recipe
from msft.config.yaml_lines import write_yaml
from tests.faults.inputs import result_or_error, short_and_long, try_all
from tests.faults.json_values import changed
from tests.faults.test_recipes import BLOCKS, SCALARS, check

LLAMA_FACTORY = {"model_name_or_path": "x", "stage": "sft", "dataset": "a", "template": "llama3", "save_steps": 5}
FIREFLY = {"model_name_or_path": "x", "train_file": "a.jsonl", "max_seq_length": 8, "template_name": "qwen"}
WORDS = st.sampled_from(["steps", "epoch", "no", "all", "cosine", "lora", "full", "pt", "a,b", "a", 0.5, 1.0, 2, -1])
INFO = {
    "a": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m"}, "tags": {"role_tag": "r"}},
    "b": {"hf_hub_url": "x/y", "num_samples": 3, "ranking": False},
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))


def of(keys):
    return st.dictionaries(st.sampled_from(sorted(keys.model_fields)), SCALARS | BLOCKS | WORDS, max_size=5)


@short_and_long(150, 4000)
def test_known_keys_with_any_values(tmp_path, count):
    files = of(LlamaFactoryKeys).map(lambda found: {**LLAMA_FACTORY, **found})
    files |= of(firefly.Keys).map(lambda found: {**FIREFLY, **found})
    try_all(count, files, lambda value: check(tmp_path, write_yaml(value)))


@short_and_long(60, 2000)
def test_any_dataset_info(tmp_path, count):
    path = tmp_path / "fuzz.yaml"
    path.write_text(write_yaml(LLAMA_FACTORY), encoding="utf-8")

    def read(info):
        (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        result_or_error(lambda: load_recipe(path), "dataset")

    try_all(count, st.just(INFO).flatmap(changed), read)
