"""Question 5: Hugging Face weights to CKPT and back, against `cp` of the same bytes."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

from benchmarks.common.answer import Answer, Figure, Verdict, absolute, compare
from benchmarks.common.process import Ran, run
from benchmarks.common.repeat import interleave
from benchmarks.common.settings import Settings
from benchmarks.programs.random_folder import largest_tensor

QUESTION = "Hugging Face weights to CKPT and back"
# Blocks of Llama 2 7B in float16 that make about so many GB together with embedding and head.
SIZES = {"2 GB": 4, "8 GB": 19}
PROGRAM = Path(__file__).parent / "programs" / "random_folder.py"
SHARE, SPARE = 0.7, 300
MEGA = 1 << 20


def measure(settings: Settings) -> Answer:
    """Convert random weights of both sizes there and back and copy them, in turns, until each is on disk."""
    answer = Answer(QUESTION, [], [], NOTES)
    for size, layers in SIZES.items():
        folder = settings.work / "conversion"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            add_size(answer, settings, folder, size, layers)
        finally:
            shutil.rmtree(folder)
    return answer


def add_size(answer: Answer, settings: Settings, folder: Path, size: str, layers: int) -> None:
    """Measure one size and add its figures, bars and raw numbers to the answer."""
    source, ckpt = folder / "hf", folder / "model.ckpt"
    run([sys.executable, PROGRAM, source, str(layers)])
    run(convert_command(source, ckpt))
    # The inputs are written out before the clock runs.
    run(["sync"])
    total = weight_bytes(source)
    copied = copy_command(source, folder / "copy")
    variants = {
        f"cp, {size}": partial(fresh, folder / "copy", copied),
        f"HF to CKPT, {size}": partial(fresh, folder / "new.ckpt", convert_command(source, folder / "new.ckpt")),
        f"CKPT to HF, {size}": partial(fresh, folder / "back", convert_command(ckpt, folder / "back", source)),
    }
    runs = interleave(variants, settings.repeats)
    figures = [
        Figure(name, "MB/s", [total / MEGA / ran.seconds for ran in repeats], [ran.peak for ran in repeats])
        for name, repeats in runs.items()
    ]
    copy, *ours = figures
    answer.figures += figures
    answer.verdicts += [bar for figure in ours for bar in bars(figure, copy)]
    answer.raw[size] = {name: [(ran.seconds, ran.peak) for ran in repeats] for name, repeats in runs.items()}
    answer.raw[size]["bytes"] = total


def bars(figure: Figure, copy: Figure) -> list[Verdict]:
    """Return the bars of one direction: its speed against cp, its memory against the largest tensor."""
    limit = largest_tensor() / MEGA + SPARE
    return [
        compare(f"{figure.name}, against cp", figure, copy, SHARE, True),
        absolute(f"{figure.name}, memory", figure.peak / MEGA, "MB", limit),
    ]


def convert_command(source: Path, target: Path, config: Path | None = None) -> list:
    """Return our command; `config` is the folder with the sizes when CKPT is turned back."""
    command = [sys.executable, "-m", "msft", "convert_weight", "--model", "llama"]
    command += ["--input_path", source, "--output_path", target]
    return [*command, "--reversed", "True", "--config", config] if config else command


def copy_command(source: Path, target: Path) -> list:
    """Return `cp` with the same promise as ours: every file is on disk when it ends."""
    return ["bash", "-c", 'cp -r "$0" "$1" && sync "$1"/*', source, target]


def fresh(target: Path, command: list) -> Ran:
    """Run a command whose output is not there yet, and take the output away again."""
    remove(target)
    ran = run(command)
    remove(target)
    return ran


def remove(target: Path) -> None:
    """Remove an output and what lies beside a CKPT."""
    shutil.rmtree(target, ignore_errors=True)
    for path in target.parent.glob(f"{target.name}*"):
        path.unlink()


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a folder's weights."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return index["metadata"]["total_size"]


NOTES = [
    "Seconds of whole commands, from the shell to files that are on disk: ours call fsync, `cp` is followed by `sync` "
    "of its files.",
    "The inputs may be in the page cache, for cp as for ours.",
]
