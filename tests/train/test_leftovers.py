"""What a killed run leaves half-written is removed by the next one, and nothing else is; one run at a time."""

import signal
import subprocess
import sys

import pytest

from msft.errors import InputError
from msft.files import atomic_path
from msft.train import outputs


def test_leftovers_are_removed_and_said(tmp_path, capsys):
    parts = [".recipe.yaml.0123abcd.part", "checkpoints/.step-4.89abcdef.part", "adapter/.x.json.00000000.part"]
    for name in parts:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / "checkpoints" / ".step-8.89abcdef.part").mkdir()
    (tmp_path / "checkpoints" / ".step-8.89abcdef.part" / "model").write_text("half")
    users = [".mine.part", "notes.0123abcd.part", "checkpoints/.step-4.0123abc.part"]
    for name in users:
        (tmp_path / name).write_text("whole")
    outputs.remove_leftovers(tmp_path)
    told = capsys.readouterr().err
    assert told.count("left half-written by a run that was killed, removed") == 4
    assert all(str(tmp_path / name) in told for name in parts)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(users)


def test_what_this_process_is_writing_stays(tmp_path, capsys):
    with atomic_path(tmp_path / "checkpoints" / "step-4") as temporary:
        temporary.mkdir()
        outputs.remove_leftovers(tmp_path)
        assert temporary.is_dir()
    assert (tmp_path / "checkpoints" / "step-4").is_dir() and capsys.readouterr().err == ""


def test_a_second_run_is_kept_out_until_the_first_has_ended(tmp_path, capsys):
    with outputs.taken(tmp_path / "output"):
        with pytest.raises(InputError, match="another run is writing to .*output"), outputs.taken(tmp_path / "output"):
            raise AssertionError("both runs are in")
        with outputs.taken(tmp_path / "elsewhere"):
            pass
    with outputs.taken(tmp_path / "output"):
        pass


def test_a_killed_run_keeps_nobody_out(tmp_path):
    code = "import sys, os, signal; from pathlib import Path; from msft.train import outputs\n"
    code += f"with outputs.taken(Path({str(tmp_path)!r})): os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / outputs.LOCK).exists()
    with outputs.taken(tmp_path):
        pass
