"""Which device MindSpore runs on."""

import fcntl
import os
import platform
import tempfile
from functools import cache
from pathlib import Path

import mindspore
from mindspore import Tensor, device_context

from msft.backend import devices
from msft.backend.contract import Runtime

KINDS = ("npu", "cuda", "cpu")
TARGETS = {"npu": "Ascend", "cuda": "GPU", "cpu": "CPU"}
COMPUTING = ("ActorThread", "KernelThread")


def _present(kind: str) -> bool:
    if kind == "cpu":
        return True
    return {"npu": device_context.ascend, "cuda": device_context.gpu}[kind].is_available()


def pick(device: str) -> tuple[str, str]:
    """Return the device to run on (cpu, cuda, npu) and why; 'auto' takes the best one present.

    Raises InputError when the one asked for is absent.
    """
    return devices.choose(device, KINDS, _present, f"mindspore {mindspore.__version__}")


def versions() -> dict[str, str]:
    """Return the versions that decide this engine's results."""
    return {"python": platform.python_version(), "mindspore": mindspore.__version__}


def bind_threads(runtime: Runtime) -> str:
    """Bind each thread in which MindSpore computes on CPU to a core, where there are enough; say what was done.

    The thread that waits for them calls `sched_yield` in a loop and would drive one of the two from its core: a step
    takes a quarter less with them bound. One process of a user does so at a time, since two would take the same cores.
    """
    if runtime.device != "cpu" or runtime.parallel:
        return "not bound to cores"
    # They begin with the first compiled function.
    mindspore.jit(_twice)(Tensor([1.0])).asnumpy()
    threads = [int(task.name) for task in Path("/proc/self/task").glob("*") if _name(task).startswith(COMPUTING)]
    cores = sorted(os.sched_getaffinity(0)) if threads else []
    if not threads or len(threads) > len(cores):
        return f"not bound to cores ({len(threads)} found, {len(cores)} cores)"
    if not _first_of_its_user():
        return "not bound to cores (another run has bound its own)"
    try:
        for thread, core in zip(threads, cores, strict=False):
            os.sched_setaffinity(thread, {core})
    except OSError as error:
        return f"not bound to cores ({error.strerror})"
    return f"{len(threads)}, bound to a core each"


@cache
def _first_of_its_user() -> bool:
    """Take a lock that the system releases when this process ends; whether no other one has it."""
    path = Path(tempfile.gettempdir()) / f"msft-{os.getuid()}.cores"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return ""


def _twice(number):
    return number + number
