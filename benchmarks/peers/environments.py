"""The peers' virtual environments, made when they are first needed and again when their requirements change."""

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.common.settings import ROOT

FOLDER = ROOT / "benchmarks" / ".venvs"
REQUIREMENTS = {
    "trl": ROOT / "benchmarks/peers/trl.txt",
    "llamafactory": ROOT / "benchmarks/peers/llamafactory.txt",
    "mindformers": ROOT / "tests/mindformers/requirements-mindformers.txt",
}
# Where `make test-mindformers` puts it too.
PLACES = {"mindformers": ROOT / ".venv-mindformers"}
TORCHAUDIO = '"""Stands in for torchaudio, whose CUDA build does not load beside a CPU build of torch."""\n'


def place(name: str) -> Path:
    """Return the folder of an environment."""
    return PLACES.get(name, FOLDER / name)


def python(name: str) -> Path:
    """Return the interpreter of an environment, which is installed now if need be."""
    folder, requirements = place(name), REQUIREMENTS[name]
    written = folder / "installed.txt"
    if not (written.exists() and written.read_bytes() == requirements.read_bytes()):
        install(name, folder, requirements)
        # Last, so that an interrupted installation is repeated.
        shutil.copyfile(requirements, written)
    return folder / "bin" / "python"


def install(name: str, folder: Path, requirements: Path) -> None:
    """Make an environment anew."""
    print(f"installing {name} into {folder} (some GB, once)", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-r", requirements], check=True)
    if name == "llamafactory":
        without_sound_and_pictures(folder, pip)


def without_sound_and_pictures(folder: Path, pip: list) -> None:
    """Take torchvision and torchaudio out: the builds on PyPI are for CUDA and do not load beside torch for the CPU.

    LLaMA-Factory imports torchaudio without using it for text, so an empty module takes its place.
    """
    subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio"], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "torchaudio.py").write_text(TORCHAUDIO)
