"""kill -9 at any moment costs no more than the steps since the last checkpoint: what is resumed ends as if undisturbed.

A run is killed before its n-th change of the disk (start-up, log, saving, renaming, removing, results), or after a
random time (steps, compiling); then the run that resumes it is killed as well, and the next one must end with the
very bytes of the undisturbed run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.faults.undisturbed import check

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("killed_program.py")


class Killer:
    """The warm process that runs and kills; `kills` counts how often it did."""

    def __init__(self, folder):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        words = [sys.executable, str(PROGRAM)]
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, env=environment, cwd=folder, text=True)
        self.kills = 0

    def run(self, recipe, output, *words, **moment):
        """Run `msft train` with its results in `output`; returns the program's answer."""
        output.parent.mkdir(parents=True, exist_ok=True)
        log = output.parent / "said.txt"
        words = ["train", str(recipe), "--output_dir", str(output), *words]
        request = {"words": words, "log": str(log), "folder": str(output.parent), **moment}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.kills += answer["status"] == -signal.SIGKILL
        assert answer["status"] in (0, -signal.SIGKILL), log.read_text()[-3000:]
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    found = Killer(tmp_path_factory.mktemp("killer"))
    yield found
    found.close()


def kill_and_resume(killer, recipe, folder, whole, moments, second):
    """Kill a run at each moment, kill the run that resumes it at `second` of its own changes, let the third end."""
    for number, moment in enumerate(moments):
        output = folder / str(number) / "output"
        killer.run(recipe, output, **moment)
        killer.run(recipe, output, "--resume_training", "True", operation=int(second[number]))
        assert killer.run(recipe, output, "--resume_training", "True")["status"] == 0
        check(output, whole)


def moments_of(undisturbed, changes, times, generator):
    """`changes` moments spread over the changes of an undisturbed run, `times` random ones over its duration."""
    numbers = np.unique(np.linspace(1, undisturbed["operations"], changes).astype(int))
    seconds = generator.uniform(0, undisturbed["seconds"], times)
    return [{"operation": int(at)} for at in numbers] + [{"seconds": float(at)} for at in seconds]


def kill_many(killer, recipe, folder, changes, times):
    """Returns how often a run was killed."""
    whole = folder / "whole" / "output"
    undisturbed = killer.run(recipe, whole)
    assert undisturbed["status"] == 0 and undisturbed["operations"] > 50
    generator = np.random.default_rng(changes)
    moments = moments_of(undisturbed, changes, times, generator)
    before = killer.kills
    kill_and_resume(killer, recipe, folder, whole, moments, generator.integers(1, 40, len(moments)))
    return killer.kills - before


@pytest.mark.parametrize("tuned", ["lora", "full"])
def test_a_few_kills(killer, recipe_of, tmp_path, tuned):
    assert kill_many(killer, recipe_of(tuned), tmp_path, changes=6, times=2) >= 12


@pytest.mark.faults
@pytest.mark.parametrize("tuned", ["lora", "full"])
def test_fifty_moments(killer, recipe_of, tmp_path, tuned):
    kills = kill_many(killer, recipe_of(tuned), tmp_path, changes=35, times=15)
    print(f"{tuned}: killed {kills} times")
    assert kills >= 85


@pytest.mark.faults
def test_mindspore_is_killed_in_the_middle_of_its_steps(recipe_of, tmp_path):
    """As processes of their own: MindSpore cannot be forked. Killed once its log has so many lines."""
    recipe = recipe_of("lora", "mindspore")
    whole = tmp_path / "whole"
    assert start(recipe, whole).wait(timeout=300) == 0
    for lines in (1, 3, 4, 7):
        output = tmp_path / str(lines)
        process = start(recipe, output)
        wait_for_lines(output / "trainer_log.jsonl", lines, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert start(recipe, output, "--resume_training", "True").wait(timeout=300) == 0
        check(output, whole)


def start(recipe, output, *words):
    command = [sys.executable, "-m", "msft", "train", str(recipe), "--output_dir", str(output), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    null = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=recipe.parent, env=environment, stdout=null, stderr=null)


def wait_for_lines(path, lines, process):
    limit = time.monotonic() + 300
    while time.monotonic() < limit and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not get {lines} lines")
