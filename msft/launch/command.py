"""The exact command line of msrun or torchrun for a layout and a program."""

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from msft.errors import InputError
from msft.launch.layout import Layout

WORKER = ("-m", "msft.launch.worker")

# What msrun and torchrun tell their processes; a launcher must not take it over from around itself.
RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "RANK_ID",
    "RANK_SIZE",
    "DEVICE_ID",
    "MS_ROLE",
    "MS_NODE_ID",
    "MS_WORKER_NUM",
    "MS_SCHED_HOST",
    "MS_SCHED_PORT",
)


@dataclass(frozen=True)
class Command:
    """Words to execute, environment variables to add, and a folder to put first on PATH ("" = none)."""

    words: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    first_on_path: str = ""

    def environment(self) -> dict[str, str]:
        """Return the whole environment of the command: this process's, without the rank it may have, and more."""
        result = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        if self.first_on_path:
            result["PATH"] = f"{self.first_on_path}{os.pathsep}{result.get('PATH', os.defpath)}"
        return result | dict(self.variables)

    def __str__(self) -> str:
        added = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        if self.first_on_path:
            added.append(f'PATH={shlex.quote(self.first_on_path)}:"$PATH"')
        return " ".join([*added, shlex.join(self.words)])


def build(layout: Layout, port: int, backend: str, program: tuple[str, ...]) -> Command:
    """Return what starts this machine's processes; raises InputError when the framework is not installed.

    A single process needs neither msrun nor torchrun.
    """
    worker = (*WORKER, str(layout.log_dir), *program)
    if layout.workers == 1:
        return Command((sys.executable, *worker))
    if backend == "mindspore":
        return Command((*_msrun(layout, port), "python3", *worker), _threads(layout), _python_folder())
    return Command((*_torchrun(layout, port), *worker), _threads(layout))


def _msrun(layout: Layout, port: int) -> list[str]:
    msrun = Path(sys.executable).with_name("msrun")
    if not msrun.is_file():
        raise InputError(f"backend mindspore: there is no msrun beside {sys.executable}: pip install 'msft[mindspore]'")
    options = {
        "worker_num": layout.workers,
        "local_worker_num": layout.local_workers,
        "master_addr": layout.master_addr,
        "master_port": port,
        "node_rank": layout.node_rank,
        "log_dir": layout.log_dir,
        "join": True,
        "cluster_time_out": layout.timeout,
        # A number that no rank has: the launcher shows the first rank's log itself, msrun would show all of them.
        "tail_worker_log": layout.workers,
    }
    return [str(msrun), *_options(options)]


def _torchrun(layout: Layout, port: int) -> list[str]:
    if importlib.util.find_spec("torch") is None:
        raise InputError(f"backend torch: torch is not installed for {sys.executable}: pip install 'msft[torch]'")
    options = {
        "nnodes": layout.nodes,
        "nproc_per_node": layout.local_workers,
        "node_rank": layout.node_rank,
        "master_addr": layout.master_addr,
        "master_port": port,
        "rdzv_conf": f"timeout={layout.timeout}",
    }
    return [sys.executable, "-m", "torch.distributed.run", *_options(options)]


def _options(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _threads(layout: Layout) -> dict[str, str]:
    """Each process takes its share of the cores, unless the user has decided otherwise."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // layout.local_workers))}


def _python_folder() -> str:
    """msrun takes python3 from PATH, which must be the python that runs now: the folder to put first, if any."""
    folder = str(Path(sys.executable).parent)
    if _is_this_python(os.environ.get("PATH", os.defpath)):
        return ""
    if _is_this_python(folder):
        return folder
    raise InputError(f"backend mindspore: msrun starts `python3`, but {sys.executable} has another name: use a venv")


def _is_this_python(path: str) -> bool:
    found = shutil.which("python3", path=path)
    # The folder counts, not the file behind a link: it decides which packages are seen.
    return bool(found) and Path(found).parent == Path(sys.executable).parent and os.path.samefile(found, sys.executable)
