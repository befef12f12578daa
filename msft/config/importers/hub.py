"""Models that are named as on the hub, found where Hugging Face's own tools have put them on this machine."""

import os
import re
from pathlib import Path


def folder_of(name: str) -> str:
    """Return the folder of a model: itself, or its newest download in Hugging Face's cache; else the name as it is."""
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    model = _cache() / f"models--{name.replace('/', '--')}"
    try:
        revision = (model / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return name
    snapshot = model / "snapshots" / revision
    return str(snapshot) if (snapshot / "config.json").is_file() else name


def _cache() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
