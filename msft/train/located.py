"""What `load_checkpoint` names when it is a folder of checkpoints: msft's own, or MindFormers' with its `rank_0`."""

import json
from pathlib import Path

from msft import console
from msft.errors import InputError
from msft.train import checkpoint, ckpt_export


def located(path: Path) -> tuple[Path, int]:
    """Return what to read, and of how many ranks it is one's part (0: it is no part).

    A folder of checkpoints stands for its newest whole one, as does the output_dir around it; the parent of `rank_0`
    for the file that `rank_0/meta.json` calls the last, or else for the newest CKPT there. Anything else is itself.
    Raises InputError when none can be taken.
    """
    for place in (path, path / checkpoint.FOLDER):
        if checkpoint.steps_in(place):
            found = checkpoint.latest_whole(place)
            if found is None:
                raise InputError(f"load_checkpoint: {place} holds no whole checkpoint")
            return found, 0
    first = path / ckpt_export.RANK
    if not first.is_dir():
        return path, 0
    ranks = [place for place in path.glob("rank_*") if any(place.glob("*.ckpt"))]
    return _last_file(first), len(ranks)


def _last_file(folder: Path) -> Path:
    meta = folder / ckpt_export.META
    if meta.is_file():
        named = _named(meta)
        if named and named == Path(named).name and (folder / named).is_file():
            return folder / named
        console.warn(f"{meta}: last_ckpt_file names no file here, so the newest is taken")
    files = sorted(folder.glob("*.ckpt"), key=lambda file: (file.stat().st_mtime, file.name))
    if not files:
        raise InputError(f"load_checkpoint: {folder} holds no CKPT")
    return files[-1]


def _named(meta: Path) -> str:
    try:
        name = json.loads(meta.read_text(encoding="utf-8"))["last_ckpt_file"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return name if isinstance(name, str) else ""
