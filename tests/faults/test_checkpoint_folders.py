"""A checkpoint folder with any file changed is found damaged, or is whole; a run never takes a damaged one."""

import dataclasses
import json
import random
import shutil

import pytest

from msft.train import checkpoint, manifest
from tests.faults.inputs import bounded, result_or_error, short_and_long, try_all
from tests.faults.json_values import changed, damaged, written

OF_TYPE = {int: 4, float: 0.5, str: "a" * 64, tuple[str, ...]: ["a", "b"], dict[str, str | None]: {"torch": "2"}}


def write(folder):
    """A folder with a checkpoint's files; what is in the tensors does not matter to who looks for damage."""
    (folder / "adapter").mkdir(parents=True)
    state = {field.name: OF_TYPE.get(field.type, {"step": 4}) for field in dataclasses.fields(checkpoint.TrainerState)}
    (folder / checkpoint.STATE).write_text(json.dumps(state))
    (folder / checkpoint.OPTIMIZER).write_bytes(bytes(range(256)))
    (folder / "recipe.yaml").write_text("backend: torch\n")
    (folder / "adapter" / "weights.bin").write_bytes(bytes(range(256)))
    manifest.write(folder)


@pytest.fixture
def checkpoints(tmp_path):
    """step-2 and step-4, both whole."""
    for step in (2, 4):
        write(tmp_path / f"step-{step}")
    return tmp_path


FILES = ["trainer_state.json", "optimizer.safetensors", "recipe.yaml", "adapter/weights.bin", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@short_and_long(30, 400)
def test_any_flipped_bit_and_any_cut_is_found(checkpoints, name, count):
    path = checkpoints / "step-4" / name
    content = path.read_bytes()
    generator = random.Random(1)
    assert checkpoint.latest_whole(checkpoints).name == "step-4"
    for _ in range(count):
        data = bytearray(content)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        if generator.random() < 0.3:
            data = data[: generator.randrange(len(data))]
        path.write_bytes(data)
        with bounded():
            assert checkpoint.latest_whole(checkpoints).name == "step-2" or json.loads(data) == json.loads(content)


@short_and_long(60, 2000)
def test_any_manifest(checkpoints, count):
    """A manifest that is not what was written may leave files out, but never calls a changed file whole."""
    folder = checkpoints / "step-4"
    sound = json.loads((folder / "manifest.json").read_text())

    def check(content):
        (folder / "manifest.json").write_bytes(content)
        for problem in manifest.problems(folder):
            assert str(folder) in problem

    try_all(count, changed(sound).map(written) | damaged(written(sound)), check)


@short_and_long(60, 2000)
def test_any_trainer_state(checkpoints, count):
    """With a manifest that fits: what is not this version's state is refused by name."""
    folder = checkpoints / "step-4"
    sound = json.loads((folder / "trainer_state.json").read_text())
    assert checkpoint.read_state(folder).step == 4

    def check(content):
        (folder / "trainer_state.json").write_bytes(content)
        state = result_or_error(lambda: checkpoint.read_state(folder), str(folder))
        assert state is None or isinstance(state, checkpoint.TrainerState)

    try_all(count, changed(sound).map(written) | damaged(written(sound)), check)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(checkpoints, name):
    (checkpoints / "step-4" / name).unlink()
    assert checkpoint.latest_whole(checkpoints).name == "step-2"
    shutil.rmtree(checkpoints / "step-2")
    assert checkpoint.latest_whole(checkpoints) is None
