"""Every file that a run reads, cut at many lengths and with single bits flipped, through `msft train --dry_run`.

Either the run is prepared from the very same content, or it ends with code 2 and names the file. Where a format has
a checksum (CKPT, torch.save's zip, a checkpoint's manifest) no changed number gets through. The other formats say
nothing about changed numbers: safetensors, GGUF and MindRecord values are read as they stand. For training data a
change shows in the data's SHA-256, which every run writes to versions.json and every checkpoint repeats.
"""

import json
import random
import shutil

import numpy as np
import pytest

from msft.cli.main import main as msft
from msft.config.load import load_recipe
from msft.convert.adapter import read_adapter
from msft.convert.check import check_against
from msft.convert.open import open_weights, read_spec
from msft.convert.weights import write_ckpt
from msft.data.mindrecord import open_mindrecord
from msft.data.tokenizers import open_tokenizer
from msft.errors import InputError
from tests.data.small_mindrecord import HEADER, PAGE, write_small
from tests.data.text_folders import llama_model
from tests.faults.inputs import bounded, short_and_long


@pytest.fixture
def place(tmp_path, tiny_model):
    """A folder with everything a run reads: model (one file, and shards under an index), adapter, data, tokenizers."""
    shutil.copytree(tiny_model, tmp_path / "model")
    spec = read_spec(tmp_path / "model")
    source = open_weights(tmp_path / "model", spec)
    write_ckpt(source, spec, tmp_path / "model.ckpt")
    _write_shards(source, tmp_path / "shards", tmp_path / "model" / "config.json")
    _write_torch(source, tmp_path / "model.bin")
    _write_adapter(source, spec, tmp_path / "adapter")
    write_small(tmp_path / "x.mindrecord", ids=(3, 128), labels=700)
    shutil.copy(llama_model(), tmp_path / "tokenizer.model")
    return tmp_path


def _write_shards(source, folder, config):
    from safetensors.numpy import save_file

    folder.mkdir()
    shutil.copy(config, folder)
    names = sorted(source.tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: source.read(name) for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_torch(source, path):
    import torch

    torch.save({name: torch.from_numpy(source.read(name)) for name in source.tensors}, path)


def _write_adapter(source, spec, folder):
    from msft.backend.contract import Lora
    from msft.convert.adapter import write_adapter
    from msft.models.targets import lora_modules

    modules = tuple(lora_modules(None, spec))
    weights = {}
    for module in modules:
        rows, columns = source.tensors[f"{module}.weight"].shape
        weights[f"base_model.model.{module}.lora_A.weight"] = np.ones((4, columns), np.float32)
        weights[f"base_model.model.{module}.lora_B.weight"] = np.ones((rows, 4), np.float32)
    write_adapter(folder, Lora(4, 8.0, 0.0, modules), weights, "base", spec)


def weights_at(path, spec_from):
    spec = read_spec(spec_from)
    source = open_weights(path, spec)
    check_against(spec, source)
    return [(name, source.read(name).tobytes()) for name in sorted(source.tensors)]


def tokens_at(path):
    tokenizer = open_tokenizer(path)
    texts = ["w3 w4 w127 <s>", "Hello é 你"]
    return [each.ids.tolist() for each in tokenizer.encode(texts)], tokenizer.pad_id, tokenizer.prefix_ids


def adapter_at(path):
    config, weights = read_adapter(path)
    return config, sorted((name, array.tobytes()) for name, array in weights.items())


def data_at(path):
    dataset = open_mindrecord(path)
    rows = [dataset.row(index) for index in range(len(dataset))]
    return [(row["input_ids"].tolist(), row["labels"].tolist()) for row in rows]


# Name -> (what reads it, whether changed content can be told from sound content by a checksum or by its structure).
KINDS = {
    "model/model.safetensors": (lambda place: weights_at(place / "model", place / "model"), False),
    "shards/b.safetensors": (lambda place: weights_at(place / "shards", place / "shards"), False),
    "shards/model.safetensors.index.json": (lambda place: weights_at(place / "shards", place / "shards"), True),
    "model.ckpt": (lambda place: weights_at(place / "model.ckpt", place / "model"), True),
    "model.bin": (lambda place: weights_at(place / "model.bin", place / "model"), True),
    "model/config.json": (lambda place: read_spec(place / "model"), False),
    "model/tokenizer.json": (lambda place: tokens_at(place / "model"), False),
    "model/tokenizer_config.json": (lambda place: tokens_at(place / "model"), False),
    "tokenizer.model": (lambda place: tokens_at(place / "tokenizer.model"), False),
    "adapter/adapter_config.json": (lambda place: adapter_at(place / "adapter"), False),
    "adapter/adapter_model.safetensors": (lambda place: adapter_at(place / "adapter"), False),
    "x.mindrecord": (lambda place: data_at(place / "x.mindrecord"), False),
    "x.mindrecord.db": (lambda place: data_at(place / "x.mindrecord"), True),
}


def outcome(read, place, named: str):
    """What reading gives, or None for an InputError that names the file (or its folder, for a file that is gone)."""
    with bounded():
        try:
            return read(place)
        except InputError as error:
            for problem in error.problems:
                # What is wrong with an index is said of the file it belongs to.
                assert named.removesuffix(".db") in problem or str(place / named.split("/")[0]) in problem, problem
                assert "\n" not in problem and len(problem) < 2000
            return None


def lengths(content: bytes, count: int) -> list[int]:
    """0, 1, the ends of headers and pages, one byte less, and random ones: `count` lengths."""
    size = len(content)
    edges = [
        0,
        1,
        7,
        8,
        9,
        100,
        HEADER - 1,
        HEADER,
        HEADER + 1,
        HEADER + PAGE,
        size // 2,
        size - 18,
        size - 17,
        size - 1,
    ]
    header = 8 + int.from_bytes(content[:8], "little")
    edges += [header - 1, header, header + 1]
    chosen = sorted({edge for edge in edges if 0 <= edge < size})
    return [*chosen, *random.Random(7).sample(range(size), min(size, max(0, count - len(chosen))))]


@pytest.mark.parametrize("name", KINDS)
@short_and_long(20, 250)
def test_cut(place, name, count):
    read, _ = KINDS[name]
    sound = read(place)
    content = (place / name).read_bytes()
    tried = lengths(content, count)
    for size in tried:
        (place / name).write_bytes(content[:size])
        found = outcome(read, place, name)
        assert found is None or found == sound, f"{name} cut at {size}"
    assert len(tried) >= min(count, len(content))


@pytest.mark.parametrize("name", KINDS)
@short_and_long(20, 400)
def test_flipped(place, name, count):
    read, told = KINDS[name]
    sound = read(place)
    content = (place / name).read_bytes()
    generator = random.Random(5)
    for _ in range(count):
        data = bytearray(content)
        # Half of the flips near the front, where headers are.
        end = len(data) if generator.random() < 0.5 else min(len(data), 2000)
        data[generator.randrange(end)] ^= 1 << generator.randrange(8)
        (place / name).write_bytes(data)
        found = outcome(read, place, name)
        assert found is None or found == sound or not told, f"{name}: a flipped bit went unseen"


@short_and_long(30, 600)
def test_changed_data_has_another_digest(place, count):
    """MindRecord has no checksum: what tells changed values is the digest, which covers every byte of every page."""
    path = place / "x.mindrecord"
    sound, digest, content = data_at(path), open_mindrecord(path).digest(), path.read_bytes()
    generator = random.Random(3)
    changed = 0
    for _ in range(count):
        data = bytearray(content)
        data[generator.randrange(HEADER, len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        rows = outcome(lambda place: data_at(path), place, "x.mindrecord")
        if rows is not None and rows != sound:
            changed += 1
            assert open_mindrecord(path).digest() != digest
    assert changed > count // 4


def test_a_recipe_cut_anywhere(write_recipe):
    """A recipe cut within a value may be a sound one: then it says so, as the resolved recipe."""
    path = write_recipe()
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with bounded():
            try:
                load_recipe(path)
            except InputError as error:
                assert all(problem.startswith(str(path)) for problem in error.problems)


RUN_FILES = ["model/model.safetensors", "model/config.json", "model/tokenizer.json", "x.mindrecord", "x.mindrecord.db"]
RUN_FILES += ["x.mindrecord.report.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]


@pytest.mark.parametrize("name", RUN_FILES)
@short_and_long(4, 60)
def test_the_command_says_which_file(place, write_recipe, capfd, name, count):
    """Exit code 0 or 2 for every cut, and on 2 the file's name: code 1 would be an error that nobody foresaw."""
    if name == "x.mindrecord.report.json":
        (place / name).write_text(json.dumps({"pad_id": 0, "rows": {"read": 12}}))
    recipe = write_recipe(
        model__pretrained=str(place / "model"),
        train_dataset__data_loader__dataset_dir=str(place / "x.mindrecord"),
        load_checkpoint=str(place / "adapter") if "adapter" in name else None,
    )
    content = (place / name).read_bytes()
    for size in lengths(content, count)[:count]:
        (place / name).write_bytes(content[:size])
        code = msft(["train", str(recipe), "--dry_run"])
        error = capfd.readouterr().err
        assert code in (0, 2) and "Traceback" not in error, error
        assert code == 0 or name in error or str((place / name).parent) in error, error
