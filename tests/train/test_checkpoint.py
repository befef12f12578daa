"""Checkpoint folders: whole or absent, damage found and named, the right one taken, old ones removed."""

import json

import numpy as np
import pytest

from msft.backend.contract import EngineState
from msft.errors import InputError, RunError
from msft.train import checkpoint, manifest

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b.weight": np.ones(4, np.float32)}
COUNTERS = {"step": 3, "optimizer_step": 2, "loss_scale": 1024.0, "good_steps": 1}


def trainer_state(step):
    return checkpoint.TrainerState(
        step=step,
        epoch=step / 7,
        total_steps=20,
        rows_per_step=8,
        seed=1,
        data="d" * 64,
        order={"rows": 56, "steps_per_epoch": 7, "shuffle": True},
        position={"epoch": step // 7, "step_in_epoch": step % 7, "rows_taken": 8 * step},
        random={"seed": 1, "dropout_step": step, "epoch": step // 7},
        schedule={"kind": "cosine", "peak": 0.1},
        tokens=123,
        skipped=1,
        counters=COUNTERS,
        tuned=tuple(ARRAYS),
        backend="torch",
        world=1,
        versions={"numpy": "1.26.4", "torch": None},
    )


def write(output, step):
    def write_files(folder, state):
        folder.mkdir()
        (folder / "recipe.yaml").write_text("seed: 1\n")

    moments = {name: array * 0.5 for name, array in ARRAYS.items()}, {name: array**2 for name, array in ARRAYS.items()}
    path = checkpoint.folder(output, step)
    checkpoint.write(path, trainer_state(step), EngineState(ARRAYS, *moments, COUNTERS), write_files)
    return path


def test_state_and_moments_come_back_exactly(tmp_path):
    path = write(tmp_path, 3)
    assert checkpoint.read_state(path) == trainer_state(3)
    first, second = checkpoint.read_moments(path)
    for name, array in ARRAYS.items():
        assert np.array_equal(first[name], array * 0.5) and first[name].dtype == np.float32
        assert np.array_equal(second[name], array**2)
    assert manifest.problems(path) == []


def test_other_libraries_read_the_moments(tmp_path):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    tensors = load_file(write(tmp_path, 3) / checkpoint.OPTIMIZER)
    assert np.array_equal(tensors["second_moment.a.weight"], ARRAYS["a.weight"] ** 2)


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.safetensors", "recipe.yaml", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_and_the_one_before_taken(tmp_path, capsys, name, damage):
    before, newest = write(tmp_path, 3), write(tmp_path, 12)
    file = newest / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-3])
    else:
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    assert checkpoint.latest_whole(tmp_path / checkpoint.FOLDER) == before
    assert f"{newest} is damaged" in capsys.readouterr().err
    problems = manifest.problems(newest)
    assert problems and (name == manifest.NAME or name in problems[0])
    with pytest.raises(InputError, match="step-12"):
        checkpoint.find(str(newest), tmp_path)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    path = write(tmp_path, 3)
    entries = json.loads((path / manifest.NAME).read_text())
    entries["files"]["../../../etc/passwd"] = {"size": 1, "sha256": ""}
    (path / manifest.NAME).write_text(json.dumps(entries))
    assert "points outside" in manifest.problems(path)[0]


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    def write_files(folder, state):
        folder.mkdir()
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(
            checkpoint.folder(tmp_path, 4), trainer_state(4), EngineState({}, {}, {}, COUNTERS), write_files
        )
    assert list((tmp_path / checkpoint.FOLDER).iterdir()) == []


@pytest.mark.parametrize("kind", ["weights", "first_moment", "second_moment"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named_and_nothing_is_written(tmp_path, kind, number):
    state = EngineState(*({name: array.copy() for name, array in ARRAYS.items()} for _ in range(3)), COUNTERS)
    getattr(state, kind)["b.weight"][2] = number
    with pytest.raises(RunError, match="step-3: not written: tensor 'b.weight'.* holds numbers that are not finite"):
        checkpoint.write(checkpoint.folder(tmp_path, 3), trainer_state(3), state, lambda folder, state: folder.mkdir())
    assert not (tmp_path / checkpoint.FOLDER).exists()


def test_steps_are_ordered_by_number_and_foreign_names_ignored(tmp_path):
    for step in (9, 10, 100):
        write(tmp_path, step)
    for name in ("step-abc", ".step-200.12345678.part", "other"):
        (tmp_path / checkpoint.FOLDER / name).mkdir()
    assert checkpoint.steps_in(tmp_path / checkpoint.FOLDER) == [100, 10, 9]


def test_pruning_never_counts_later_folders_of_another_attempt(tmp_path):
    for step in (2, 4, 6, 50):
        write(tmp_path, step)
    checkpoint.prune(tmp_path / checkpoint.FOLDER, keep=2, newest=6)
    assert checkpoint.steps_in(tmp_path / checkpoint.FOLDER) == [50, 6, 4]


def test_finding_what_resume_training_asks_for(tmp_path):
    assert checkpoint.find(True, tmp_path) is None
    assert checkpoint.find(False, tmp_path) is None
    old, new = write(tmp_path, 3), write(tmp_path, 5)
    assert checkpoint.find(False, tmp_path) is None
    assert checkpoint.find(True, tmp_path) == new
    assert checkpoint.find(str(old), tmp_path / "elsewhere") == old
    assert checkpoint.find(str(tmp_path), tmp_path / "elsewhere") == new
    assert checkpoint.find(str(tmp_path / checkpoint.FOLDER), tmp_path / "elsewhere") == new
    with pytest.raises(InputError, match="nowhere"):
        checkpoint.find(str(tmp_path / "nowhere"), tmp_path)


def test_a_state_of_other_types_is_named(tmp_path):
    path = write(tmp_path, 3)
    state = json.loads((path / checkpoint.STATE).read_text())
    for name, value in (("step", "many"), ("counters", [1]), ("tuned", 5)):
        (path / checkpoint.STATE).write_text(json.dumps({**state, name: value}))
        with pytest.raises(InputError, match=f"trainer_state.json: is not what this version of msft writes .{name}"):
            checkpoint.read_state(path)
