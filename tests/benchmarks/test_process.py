"""Protects the bench's meter: peak memory of a process and its children, exit codes, threads, order of repeats."""

import sys

import pytest

from benchmarks.common.process import Failed, run
from benchmarks.common.repeat import interleave

MEGA = 1 << 20
ALLOCATE = "import time; held = bytearray({size}); held[::4096] = b'x' * len(held[::4096]); {then}"
PARENT = "import subprocess, sys; {then}; subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"


def program(size, then="time.sleep(0.3)"):
    return ALLOCATE.format(size=size, then=then)


def test_the_peak_is_what_a_process_held_even_after_it_freed_it():
    empty = run([sys.executable, "-c", program(0)], interval=0.01)
    full = run([sys.executable, "-c", program(200 * MEGA, "del held; time.sleep(0.3)")], interval=0.01)
    assert full.peak - empty.peak == pytest.approx(200 * MEGA, rel=0.03)
    assert 0.3 <= full.seconds < 30


def test_children_count():
    alone = run([sys.executable, "-c", program(0)], interval=0.01)
    parent = [sys.executable, "-c", PARENT.format(then="pass"), program(200 * MEGA)]
    both = run(parent, interval=0.01)
    # Two interpreters, and the child's memory.
    assert both.peak - 2 * alone.peak == pytest.approx(200 * MEGA, rel=0.1)


def test_a_failed_command_shows_what_it_said():
    with pytest.raises(Failed, match="no luck"):
        run([sys.executable, "-c", "import sys; sys.exit('no luck')"])
    assert run([sys.executable, "-c", "import sys; print('out'); sys.exit(2)"], expect=2).out == "out\n"
    assert run([sys.executable, "-c", "import sys; sys.exit(7)"], expect=None).code == 7


def test_every_process_gets_two_threads():
    show = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['RAYON_NUM_THREADS'], os.environ['OWN'])"
    assert run([sys.executable, "-c", show], environment={"OWN": "x"}).out == "2 2 x\n"


def test_variants_take_turns(capsys):
    calls = []
    variants = {name: lambda name=name: (calls.append(name), len(calls))[1] for name in "ab"}
    assert interleave(variants, 3) == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert capsys.readouterr().err.count("round 2 of 3") == 2
