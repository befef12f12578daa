"""How a fault test tries many inputs: a short run in the default suite, a long one by `make test-faults`.

Every input has a deadline and a ceiling of memory, and the run counts what it tried.
"""

import contextlib
import resource
import signal
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from msft.errors import InputError

SECONDS = 10  # an input takes milliseconds; the machine may be busy
MEMORY = 512 << 20  # address space on top of what the process has; the inputs are kilobytes


class TooSlow(BaseException):
    """An input took too long; no `except Exception` of the code under test takes it for its own."""


def short_and_long(short: int, long: int):
    """Run a test with `count` = `short` in the default suite, and with `count` = `long` by `pytest -m faults`."""
    marked = pytest.param(long, marks=pytest.mark.faults, id=f"{long}")
    return pytest.mark.parametrize("count", [pytest.param(short, id=f"{short}"), marked])


def try_all(count: int, inputs: SearchStrategy, check: Callable) -> None:
    """Call `check` with at least `count` inputs, each within `bounded`; with CI set, always with the same ones."""
    tried = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def one(value):
        nonlocal tried
        tried += 1
        with bounded():
            check(value)

    one()
    assert tried >= count, f"only {tried} of {count} inputs were tried: the strategy has no more"


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, memory: int = MEMORY):
    """Stop what is inside after `seconds`, and refuse it more than `memory` bytes on top of what the process has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def _too_slow(*_):
    raise TooSlow(f"more than {SECONDS} s for one input")


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def result_or_error(action: Callable, named: str):
    """Return what `action` returns, or None when it raised a well-formed InputError that names `named`.

    Well-formed: problems of one line each, of sensible length, that can be printed as UTF-8. Anything else that is
    raised goes through and fails the test.
    """
    try:
        return action()
    except InputError as error:
        assert error.problems
        for problem in error.problems:
            assert named in problem, problem
            assert "\n" not in problem and len(problem) < 2000, problem
            problem.encode("utf-8")
        return None
