"""Question 2: the same fine-tuning on MindSpore, against our torch engine and the real MindFormers 1.3.2 on CPU."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median

from benchmarks.common.answer import Answer, Figure, compare
from benchmarks.common.process import Failed, run
from benchmarks.common.repeat import interleave
from benchmarks.common.rows import ALPHA, RANK, Rows, prepare
from benchmarks.common.settings import ROOT, Settings
from benchmarks.common.training import figure, packed_steps, train_ours
from benchmarks.lora_torch import PACKED_BATCH
from benchmarks.peers import environments
from tests.mindformers import mindformers_recipe

QUESTION = "LoRA SFT on MindSpore: seconds a step, real tokens/s"
# MindFormers' recipe pads rows to 4096, whose step does not fit into 24 GB; one of 1024 takes 23 GB.
PADDED, LENGTHS = 4096, (512, 1024)
STEPS = 3
ENGINES = ("torch", "mindspore")
PEER = f"MindFormers 1.3.2, rows padded to {PADDED}"


@dataclass(frozen=True)
class Padded:
    """MindFormers' steady seconds of a step of one row, and its peak bytes, at one padded length."""

    length: int
    seconds: float
    peak: int


def measure(settings: Settings) -> Answer:
    """Train packed rows on both engines in turns, then padded rows with MindFormers."""
    folder = settings.work / "mindspore"
    rows = prepare(settings.data, settings.model, settings.rows, folder)
    variants = {engine: partial(train_packed, engine, settings, rows, folder / engine) for engine in ENGINES}
    runs = interleave(variants, settings.repeats)
    speeds = {engine: figure(f"{engine} packed", runs[engine]) for engine in ENGINES}
    steps = {
        engine: Figure(
            f"{engine} packed, a step", "s", [run.step_seconds for run in runs[engine]], loss=runs[engine][0].loss
        )
        for engine in ENGINES
    }
    padded, notes = mindformers(settings, rows, folder / "mindformers")
    peer = Figure(PEER, "tokens/s", [mean_tokens(rows) / least_seconds_at(PADDED, padded)])
    measured = [
        Figure(f"MindFormers, a row padded to {each.length}", "s", [each.seconds], [each.peak]) for each in padded
    ]
    verdicts = [
        compare("MindSpore's step over torch's, packed fp32", steps["mindspore"], steps["torch"], 1.2, False),
        compare(f"real tokens/s against {PEER}", speeds["mindspore"], peer, 10, True),
    ]
    raw = {engine: [vars(run) for run in runs[engine]] for engine in ENGINES}
    raw["mindformers"] = [vars(each) for each in padded]
    return Answer(QUESTION, [*speeds.values(), *steps.values(), *measured, peer], verdicts, NOTES + notes, raw)


def train_packed(engine: str, settings: Settings, rows: Rows, folder: Path):
    """Train packed rows on one engine."""
    steps = packed_steps(rows, PACKED_BATCH)
    return train_ours(engine, settings.model, rows, folder, PACKED_BATCH, steps, train_dataset__packing=True)


def mindformers(settings: Settings, rows: Rows, folder: Path) -> tuple[list[Padded], list[str]]:
    """Return what MindFormers needs for a row at growing lengths, and which lengths the machine could not hold."""
    python, measured, notes = environments.python("mindformers"), [], []
    for length in LENGTHS:
        try:
            measured.append(train_padded(python, settings, rows, folder / str(length), length))
        except Failed as failure:
            notes.append(f"MindFormers did not finish rows of {length}: {str(failure).splitlines()[-1]}")
    return measured, notes


def train_padded(python: Path, settings: Settings, rows: Rows, folder: Path, length: int) -> Padded:
    """Train some steps of one padded row with MindFormers; its first step compiles and is left out."""
    data = prepare_padded(settings, rows, folder, length)
    config = json.loads((settings.model / "config.json").read_text())
    recipe = mindformers_recipe.write(
        folder / "recipe.yaml", "lora", data, Path("none"), folder / "output", changes(config, length)
    )
    program = ROOT / "benchmarks" / "peers" / "mindformers_lora.py"
    oracle = ROOT / "tests" / "mindformers" / "oracle"
    ran = run([python, program, recipe, folder / "steps.json"], environment={"PYTHONPATH": str(oracle)}, folder=folder)
    seconds = json.loads((folder / "steps.json").read_text())
    return Padded(length, median(seconds[1:]), ran.peak)


def prepare_padded(settings: Settings, rows: Rows, folder: Path, length: int) -> Path:
    """Write the rows again, padded to another length, and return the MindRecord file."""
    return prepare(rows.alpaca, settings.model, STEPS, folder, length).mindrecord


def changes(config: dict, length: int) -> dict:
    """Return what turns MindFormers' LoRA recipe for Llama 2 7B into one for this model, with one row a step."""
    sizes = {
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "intermediate_size": config["intermediate_size"],
        "theta": config["rope_theta"],
        "pad_token_id": config["pad_token_id"],
        "seq_length": length,
        "max_position_embedding": length,
        "pet_config.lora_rank": RANK,
        "pet_config.lora_alpha": ALPHA,
    }
    others = {"load_checkpoint": "", "runner_config.batch_size": 1, "runner_config.epochs": 1, "callbacks": []}
    return {f"model.model_config.{name}": value for name, value in sizes.items()} | others


def mean_tokens(rows: Rows) -> float:
    """Return the mean number of real tokens in a row."""
    return fmean(len(row["input_ids"]) for row in json.loads(rows.tokens.read_text()))


def least_seconds_at(length: int, measured: Sequence[Padded]) -> float:
    """Return the least seconds that a step of this length can take: as much a token as the longest measured one."""
    longest = max(measured, key=lambda each: each.length)
    return longest.seconds * length / longest.length


NOTES = [
    f"MindFormers runs in graph mode with random weights of the model's shape, one row a step. A row of {PADDED} does "
    "not fit into the machine's memory: its seconds are those of the longest row that does, a token, which favours "
    "MindFormers (its seconds a token grow with the length).",
]
