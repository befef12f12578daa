"""One training run as a process: its steps, its memory; ours by `msft train`, peers by their own scripts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import yaml

from benchmarks.common.answer import Figure
from benchmarks.common.process import run
from benchmarks.common.rows import ALPHA, LENGTH, RANK, SEED, Rows

WARM_UP = 1


@dataclass(frozen=True)
class Training:
    """A run: seconds, real tokens and loss of each step, and the peak bytes of its processes."""

    steps: list[dict]
    peak: int

    @property
    def tokens_per_second(self) -> float:
        """Real tokens over seconds, without the first steps."""
        steady = self.steps[WARM_UP:]
        return sum(step["tokens"] for step in steady) / sum(step["seconds"] for step in steady)

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step, without the first steps."""
        return fmean(step["seconds"] for step in self.steps[WARM_UP:])

    @property
    def loss(self) -> float:
        """Mean loss over all steps: equal rows in other batches give nearly equal means."""
        return fmean(step["loss"] for step in self.steps)


def figure(name: str, runs: Sequence[Training]) -> Figure:
    """Return the real tokens per second of a run's repeats."""
    return Figure(name, "tokens/s", [run.tokens_per_second for run in runs], [run.peak for run in runs], runs[0].loss)


def train_ours(engine: str, model: Path, rows: Rows, folder: Path, batch_size: int, steps: int, **changes) -> Training:
    """Run `msft train` in a folder of its own; `changes` are keys of the recipe, dotted with two underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(engine, model, rows, folder / "output", batch_size, steps)))
    flags = [word for key, value in changes.items() for word in (f"--{key.replace('__', '.')}", str(value))]
    ran = run([sys.executable, "-m", "msft", "train", path, *flags])
    log = (folder / "output" / "trainer_log.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, log) if "loss" in record]
    return Training([{key: record[key] for key in ("seconds", "tokens", "loss")} for record in records], ran.peak)


def recipe(engine: str, model: Path, rows: Rows, output: Path, batch_size: int, steps: int) -> dict:
    """Return the recipe of the measured run: LoRA on q, k, v, o, AdamW with a constant rate, rows in their order."""
    return {
        "backend": engine,
        "device": "cpu",
        "seed": SEED,
        "output_dir": str(output),
        "run_mode": "finetune",
        "model": {
            "pretrained": str(model),
            "seq_length": LENGTH,
            "pet_config": {
                "pet_type": "lora",
                "lora_rank": RANK,
                "lora_alpha": ALPHA,
                "lora_dropout": 0.0,
                "target_modules": ".*q_proj|.*k_proj|.*v_proj|.*o_proj",
            },
        },
        "train_dataset": {
            "data_loader": {"dataset_dir": str(rows.mindrecord), "shuffle": False},
            "batch_size": batch_size,
            "padding": "longest",
        },
        "runner_config": {"epochs": 1, "stop_step": steps},
        "optimizer": {"type": "AdamW"},
        "lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": 1e-4},
        "runner_wrapper": {"max_grad_norm": 1.0},
        # A checkpoint in the middle would be timed with a step.
        "callbacks": [{"type": "MFLossMonitor"}],
    }


def packed_steps(rows: Rows, batch_size: int) -> int:
    """Return how many full steps every packer makes of the rows: their real tokens over a packed step's places."""
    tokens = sum(len(row["input_ids"]) for row in json.loads(rows.tokens.read_text()))
    return tokens // (batch_size * (LENGTH + 1))


def train_peer(python: Path, script: str, folder: Path, *words: object) -> Training:
    """Run a peer's script; among its words STEPS_FILE stands for the file that it writes its steps to."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = folder / "steps.json"
    command = [python, Path(__file__).parents[1] / "peers" / script, *words]
    ran = run([steps if word == STEPS_FILE else word for word in command], environment=OFFLINE, folder=folder)
    return Training(json.loads(steps.read_text()), ran.peak)


STEPS_FILE = "STEPS_FILE"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
