"""Question 7: generated tokens per second, one prompt and eight at a time, greedy."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.common.answer import Answer, Figure, Verdict, compare
from benchmarks.common.process import run
from benchmarks.common.repeat import interleave
from benchmarks.common.rows import prepare
from benchmarks.common.settings import Settings
from benchmarks.common.training import OFFLINE
from benchmarks.peers import environments
from msft.backend.contract import IGNORE

QUESTION = "generated tokens per second"
NEW_TOKENS = 128
BATCHES = (1, 8)
FOLDER = Path(__file__).parent
OURS = FOLDER / "programs" / "generate.py"
PEER = FOLDER / "peers" / "hf_generate.py"
PEER_NAME = "transformers generate"
# (ours, peer) -> the least ratio at each batch size.
BARS = {("torch", PEER_NAME): (1.3, 1.5), ("mindspore", "torch"): (0.8, 0.8)}


def measure(settings: Settings) -> Answer:
    """Let both engines and transformers continue the same alpaca prompts, in turns."""
    folder = settings.work / "generation"
    rows = prepare(settings.data, settings.model, max(BATCHES), folder)
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps([prompt(row) for row in json.loads(rows.tokens.read_text())]))
    variants = {name: partial(generate, command) for name, command in commands(settings, prompts).items()}
    runs = interleave(variants, settings.repeats)
    figures = {
        name: Figure(name, "tokens/s", [run["rate"] for run in repeats], [run["peak"] for run in repeats])
        for name, repeats in runs.items()
    }
    tokens = {name: repeats[0]["tokens"] for name, repeats in runs.items()}
    return Answer(QUESTION, list(figures.values()), verdicts(figures), NOTES + agreement(tokens), runs)


def commands(settings: Settings, prompts: Path) -> dict[str, list]:
    """Return a command for each program and batch size."""
    words = {size: (settings.model, prompts, str(size), str(NEW_TOKENS)) for size in BATCHES}
    peer = environments.python("trl")
    every = {}
    for size in BATCHES:
        every |= {
            named(engine, size): [sys.executable, OURS, engine, *words[size]] for engine in ("torch", "mindspore")
        }
        every[named(PEER_NAME, size)] = [peer, PEER, *words[size]]
    return every


def named(name: str, size: int) -> str:
    """Return how a program is called at a batch size."""
    return f"{name}, batch {size}"


def prompt(row: dict[str, list[int]]) -> list[int]:
    """Return a training row up to its answer."""
    start = next(place for place, label in enumerate(row["labels"]) if label != IGNORE)
    return row["input_ids"][:start]


def generate(command: Sequence) -> dict:
    """Return a program's tokens and its rate; loading and a first, short generation are outside its clock."""
    ran = run(command, environment=OFFLINE)
    said = json.loads(ran.out.splitlines()[-1])
    count = sum(map(len, said["tokens"]))
    return {"rate": count / said["seconds"], "seconds": said["seconds"], "peak": ran.peak, "tokens": said["tokens"]}


def verdicts(figures: dict[str, Figure]) -> list[Verdict]:
    """Return the issue's bars."""
    return [
        compare(
            f"{ours} against {peer}, batch {size}", figures[named(ours, size)], figures[named(peer, size)], limit, True
        )
        for (ours, peer), limits in BARS.items()
        for size, limit in zip(BATCHES, limits, strict=True)
    ]


def agreement(tokens: dict[str, list[list[int]]]) -> list[str]:
    """Say for how many prompts each program gave the tokens that transformers gave."""
    notes = []
    for size in BATCHES:
        expected = tokens[named(PEER_NAME, size)]
        for engine in ("torch", "mindspore"):
            equal = sum(a == b for a, b in zip(tokens[named(engine, size)], expected, strict=True))
            notes.append(f"{named(engine, size)}: {equal} of {size} answers have transformers' {NEW_TOKENS} tokens.")
    return notes


NOTES = [f"Greedy, {NEW_TOKENS} new tokens for every prompt (no end token stops), float32, key-value cache."]
