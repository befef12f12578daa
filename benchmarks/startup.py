"""Question 6: how long, and how much memory, until a command answers."""

import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

import yaml

from benchmarks.common.answer import Answer, Figure, Verdict, absolute
from benchmarks.common.process import Ran, run
from benchmarks.common.repeat import interleave
from benchmarks.common.rows import prepare
from benchmarks.common.settings import Settings
from benchmarks.common.training import recipe
from benchmarks.peers import environments

QUESTION = "seconds and memory until a command answers"
# Short processes: a look at their memory every millisecond.
INTERVAL = 0.001
ROWS, BATCH = 16, 8
HELP, ERROR, FIRST_STEP = "msft --help", "msft train, a mistyped key", "msft train to its first step"
MEGA = 1 << 20
POLL = 0.01


def measure(settings: Settings) -> Answer:
    """Time help, a mistyped key and the first step, ours and the peers' in turns."""
    runs = interleave(ours(settings) | peers(settings), settings.repeats)
    figures = figures_of(runs)
    raw = {name: [{"seconds": ran.seconds, "peak": ran.peak} for ran in repeats] for name, repeats in runs.items()}
    return Answer(QUESTION, list(figures.values()), verdicts(figures), NOTES, raw)


def figures_of(runs: dict[str, list[Ran]]) -> dict[str, Figure]:
    """Return seconds and peaks by name."""
    return {
        name: Figure(name, "s", [ran.seconds for ran in repeats], [ran.peak for ran in repeats])
        for name, repeats in runs.items()
    }


def ours(settings: Settings) -> dict[str, partial[Ran]]:
    """Return our commands, run through the console script as a user does."""
    folder = settings.work / "startup"
    rows = prepare(settings.data, settings.model, ROWS, folder / "rows")
    msft = Path(sys.executable).parent / "msft"
    good, wrong = folder / "recipe.yaml", folder / "wrong.yaml"
    keys = recipe("torch", settings.model, rows, folder / "output", BATCH, 1)
    good.write_text(yaml.safe_dump(keys))
    wrong.write_text(yaml.safe_dump(keys | {"lr_schedul": keys["lr_schedule"]}))
    log = folder / "output" / "trainer_log.jsonl"
    return {
        HELP: partial(run, [msft, "--help"], interval=INTERVAL),
        ERROR: partial(run, [msft, "train", wrong], interval=INTERVAL, expect=2),
        FIRST_STEP: partial(until_line, [msft, "train", good], log),
    }


def peers(settings: Settings) -> dict[str, partial[Ran]]:
    """Return the peers' commands; a wrong key ends theirs with a traceback."""
    factory, trl = (environments.python(name).parent for name in ("llamafactory", "trl"))
    wrong = settings.work / "startup" / "llamafactory.yaml"
    wrong.write_text(yaml.safe_dump({"model_name_or_path": str(settings.model), "learning_rat": 1e-4}))
    typo = [trl / "trl", "sft", "--model_name_or_path", settings.model, "--learning_rat", "1e-4"]
    return {
        "llamafactory-cli help": partial(run, [factory / "llamafactory-cli", "help"]),
        "llamafactory-cli, a mistyped key": partial(run, [factory / "llamafactory-cli", "train", wrong], expect=None),
        "trl --help": partial(run, [trl / "trl", "--help"]),
        "trl, a mistyped key": partial(run, typo, expect=None),
    }


def until_line(command: list[str | os.PathLike], log: Path) -> Ran:
    """Run a command; its seconds are those until the first line of a file that it writes."""
    log.unlink(missing_ok=True)
    written: list[float] = []
    watcher = threading.Thread(target=watch, args=(log, written), daemon=True)
    began = time.perf_counter()
    watcher.start()
    ran = run(command)
    watcher.join()
    return Ran(written[0] - began, ran.peak, ran.code, ran.out, ran.err)


def watch(log: Path, written: list[float]) -> None:
    """Note the time when a file has its first bytes; give up after ten minutes."""
    end = time.perf_counter() + 600
    while time.perf_counter() < end:
        if log.exists() and log.stat().st_size:
            written.append(time.perf_counter())
            return
        time.sleep(POLL)


def verdicts(figures: dict[str, Figure]) -> list[Verdict]:
    """Return the issue's bars: seconds and memory of help, seconds of an error."""
    return [
        absolute("msft --help", figures[HELP].value, "s", 0.15),
        absolute("msft --help, memory", figures[HELP].peak / MEGA, "MB", 60),
        absolute("a mistyped key in a recipe", figures[ERROR].value, "s", 0.3),
    ]


NOTES = [
    f"The first step: {BATCH} rows of alpaca with SmolLM2-135M on torch, from the shell to the first line of the log.",
    "Files are in the page cache, as for a user's second call.",
]
