"""The machine and the versions that the numbers belong to."""

import os
import platform
import subprocess
import time
from importlib.metadata import distributions
from pathlib import Path

from benchmarks.common.process import THREADS

PACKAGES = ("torch", "mindspore", "mindformers", "transformers", "peft", "trl", "llamafactory", "tokenizers", "numpy")


def describe(root: Path, pythons: dict[str, Path]) -> dict:
    """Return processor, memory, system, this project's commit, and package versions here and in each environment."""
    commit = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "processor": _first("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "memory": _first("/proc/meminfo", "MemTotal"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "versions": {"msft": installed()} | {name: versions_of(python) for name, python in pythons.items()},
    }


def _first(path: str, key: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "unknown")


def installed(folders: list[str] | None = None) -> dict[str, str]:
    """Return the versions of the packages that matter, here or in a list of folders."""
    found = distributions(path=folders) if folders else distributions()
    versions = {distribution.name.lower(): distribution.version for distribution in found}
    return {name: versions[name] for name in PACKAGES if name in versions}


def versions_of(python: Path) -> dict[str, str]:
    """Return the versions in another virtual environment, which is not imported for it."""
    return installed([str(folder) for folder in python.parents[1].glob("lib/python3*/site-packages")])
