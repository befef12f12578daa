"""Which device MindSpore runs on."""

import os
import platform
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
    takes a quarter less with them bound. Ranks on one machine would all take the same cores: theirs stay as they are.
    """
    if runtime.device != "cpu" or runtime.parallel:
        return "not bound to cores"
    # They begin with the first compiled function.
    mindspore.jit(_twice)(Tensor([1.0])).asnumpy()
    tasks = Path("/proc/self/task")
    threads = (
        [int(task.name) for task in tasks.glob("*") if _name(task).startswith(COMPUTING)] if tasks.is_dir() else []
    )
    cores = sorted(os.sched_getaffinity(0)) if threads else []
    if not threads or len(threads) > len(cores):
        return f"not bound to cores ({len(threads)} found, {len(cores)} cores)"
    for thread, core in zip(threads, cores, strict=False):
        os.sched_setaffinity(thread, {core})
    return f"{len(threads)}, bound to a core each"


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text()
    except FileNotFoundError:  # it has just ended
        return ""


def _twice(number):
    return number + number
