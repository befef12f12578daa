"""Disks that are full or read-only, data that vanishes, checkpoints with a flipped byte: named, and nothing is lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from msft.cli.train import main
from msft.train import manifest
from msft.train.reporter import Reporter
from tests.faults.undisturbed import check

ROOT = Path(__file__).parents[2]
# A mount of its own needs root, or a user namespace in which one is root.
NAMESPACE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
FULL_THEN_LARGER = """
mount -t tmpfs -o size=$SIZE tmpfs $DISK
$MSFT --output_dir $DISK/output 2> $TOLD/first.txt; echo $? > $TOLD/first.code
cp -r $DISK/output $TOLD/after_first
mount -o remount,size=64m $DISK
$MSFT --output_dir $DISK/output --resume_training True 2> $TOLD/second.txt; echo $? > $TOLD/second.code
cp -r $DISK/output $TOLD/output
"""
READ_ONLY = """
mount -t tmpfs tmpfs $DISK
mount -o remount,ro $DISK
$MSFT --output_dir $DISK/output 2> $TOLD/first.txt; echo $? > $TOLD/first.code
"""


# One thread: torch's sums may differ in their last digit with the number of threads.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def in_a_namespace(script, recipe, folder, size="64m"):
    """Run a shell script with a mount point DISK, a folder TOLD for what it keeps, and the command MSFT."""
    disk, told = folder / "disk", folder / "told"
    for place in (disk, told):
        place.mkdir(parents=True)
    environment = {**ONE_THREAD, "MSFT": f"{sys.executable} -m msft train {recipe}"}
    environment |= {"DISK": str(disk), "TOLD": str(told), "SIZE": str(size)}
    done = subprocess.run([*NAMESPACE, "bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return told


def size_of(output):
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in output.rglob("*") if path.is_file())


def full_disk(recipe, tmp_path, parts):
    """Fill a disk of so many parts of what the run needs, then give it room and resume."""
    whole = tmp_path / "whole"
    command = [sys.executable, "-m", "msft", "train", str(recipe), "--output_dir", str(whole)]
    subprocess.run(command, env=ONE_THREAD, check=True)
    for part in parts:
        told = in_a_namespace(FULL_THEN_LARGER, recipe, tmp_path / str(part), int(size_of(whole) * part))
        first = (told / "first.txt").read_text()
        assert (told / "first.code").read_text() == "1\n", first
        assert "cannot be written: No space left on device" in first and "Traceback" not in first
        assert not [name for name in (told / "after_first" / "checkpoints").glob("step-*") if manifest.problems(name)]
        assert (told / "second.code").read_text() == "0\n", (told / "second.txt").read_text()
        check(told / "output", whole)


def test_a_full_disk(recipe_of, tmp_path):
    full_disk(recipe_of("full"), tmp_path, [0.6])


@pytest.mark.faults
@pytest.mark.parametrize("tuned", ["lora", "full"])
def test_a_disk_that_is_full_at_any_time(recipe_of, tmp_path, tuned):
    full_disk(recipe_of(tuned), tmp_path, [0.05, 0.2, 0.35, 0.5, 0.75, 0.9])


def test_a_read_only_disk(recipe_of, tmp_path):
    told = in_a_namespace(READ_ONLY, recipe_of("lora"), tmp_path)
    assert (told / "first.code").read_text() == "1\n"
    assert f"error: {tmp_path / 'disk' / 'output'}" in (told / "first.txt").read_text()
    assert "Read-only file system" in (told / "first.txt").read_text()


def test_data_that_vanished_is_named_and_nothing_is_lost(recipe_of, tmp_path, tiny_data, capsys):
    recipe, output, whole = str(recipe_of("lora")), tmp_path / "output", tmp_path / "whole"
    assert main([recipe, "--output_dir", str(whole)]) == 0
    data = tmp_path / "moving.mindrecord"
    for suffix in ("", ".db"):
        shutil.copy(f"{tiny_data[0]}{suffix}", f"{data}{suffix}")
    words = ["--output_dir", str(output), "--train_dataset_dir", str(data)]
    assert main([recipe, *words, "--runner_config.stop_step", "4"]) == 0
    away = data.rename(tmp_path / "away.mindrecord")
    assert main([recipe, *words, "--resume_training", "True"]) == 2
    assert f"{data} does not exist" in capsys.readouterr().err
    away.rename(data)
    assert main([recipe, *words, "--resume_training", "True"]) == 0
    check(output, whole)


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_data_that_is_lost_while_a_run_reads_it(recipe_of, tmp_path, tiny_data, monkeypatch, capsys, damage):
    """A removed file stays readable for the run that has it open; a cut one is named, and the checkpoint stays."""
    recipe, output, whole = str(recipe_of("lora")), tmp_path / "output", tmp_path / "whole"
    assert main([recipe, "--output_dir", str(whole)]) == 0
    data = tmp_path / "lost.mindrecord"
    for suffix in ("", ".db"):
        shutil.copy(f"{tiny_data[0]}{suffix}", f"{data}{suffix}")
    told = Reporter.step

    def losing(self, record):
        told(self, record)
        if record.step == 3:
            data.unlink() if damage == "removed" else os.truncate(data, data.stat().st_size // 3)

    monkeypatch.setattr(Reporter, "step", losing)
    words = ["--output_dir", str(output), "--train_dataset_dir", str(data)]
    if damage == "removed":
        assert main([recipe, *words]) == 0
        check(output, whole)
        return
    assert main([recipe, *words]) == 2
    assert str(data) in capsys.readouterr().err
    assert not manifest.problems(output / "checkpoints" / "step-2")


def test_a_flipped_byte_in_any_file_of_the_newest_checkpoint(recipe_of, tmp_path, capsys):
    """One file after another: it is named, the checkpoint before is taken, and the end is the same."""
    recipe, whole, stopped = str(recipe_of("lora")), tmp_path / "whole", tmp_path / "stopped"
    assert main([recipe, "--output_dir", str(whole)]) == 0
    assert main([recipe, "--output_dir", str(stopped), "--runner_config.stop_step", "6"]) == 0
    names = sorted(path.name for path in (stopped / "checkpoints" / "step-6").iterdir())
    assert len(names) >= 6
    for name in names:
        output = tmp_path / "flipped" / name
        shutil.copytree(stopped, output)
        file = output / "checkpoints" / "step-6" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
        capsys.readouterr()
        assert main([recipe, "--output_dir", str(output), "--resume_training", "True"]) == 0
        told = capsys.readouterr().err
        assert "step-6 is damaged and passed over" in told and name in told
        assert "resuming after step 4" in told
        check(output, whole)
