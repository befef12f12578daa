"""What `load_checkpoint` names when it is a folder of checkpoints: msft's own, or MindFormers' with its `rank_0`."""

from pathlib import Path

from msft.convert.rank_folder import last_file
from msft.errors import InputError
from msft.train import checkpoint, ckpt_export


def located(path: Path) -> Path:
    """Return what to read.

    A folder of checkpoints stands for its newest whole one, as does the output_dir around it; the parent of `rank_0`
    for the file that `rank_0/meta.json` calls the last, or else for the newest CKPT there. Anything else is itself.
    Raises InputError when none can be taken.
    """
    for place in (path, path / checkpoint.FOLDER):
        if checkpoint.steps_in(place):
            found = checkpoint.latest_whole(place)
            if found is None:
                raise InputError(f"load_checkpoint: {place} holds no whole checkpoint")
            return found
    first = path / ckpt_export.RANK
    return last_file(first) if first.is_dir() else path
