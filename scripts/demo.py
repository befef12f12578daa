"""The quickstart on one or both engines: ask, preprocess, train, ask again, and compare the two runs.

Every step is a command that a user could type; it is printed before it runs.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from msft.train.plot import save_loss_curves

RECIPE = "configs/quickstart.yaml"
OUTPUT = Path("output/quickstart")
QUESTIONS = (
    "What is msft?",
    "How can I pick the engine in msft?",
    "I have a LoRA adapter from msft. How do I merge it?",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--engines", required=True, type=lambda words: words.split(","))
    words = parser.parse_args()
    began = time.monotonic()
    preprocess(words.model)
    before = {engine: ask(words.model, engine) for engine in words.engines}
    for engine in words.engines:
        run("train", RECIPE, "--backend", engine, "--output_dir", str(OUTPUT / engine))
    after = {engine: ask(words.model, engine, OUTPUT / engine / "adapter") for engine in words.engines}
    show_losses({engine: read_losses(OUTPUT / engine / "trainer_log.jsonl") for engine in words.engines})
    show_answers(before, after)
    print(f"\nDone in {time.monotonic() - began:.0f} s. Ask it yourself:")
    adapter = OUTPUT / words.engines[0] / "adapter"
    print(f'  .venv/bin/msft generate --model {words.model} --adapter {adapter} --prompt "What is msft?"')
    return 0


def run(*words: str, capture: bool = False) -> str:
    """Run an msft command; return what it printed if `capture`, and end the demo when it fails."""
    print(f"\n$ msft {shlex.join(words)}", flush=True)
    output = subprocess.PIPE if capture else None
    done = subprocess.run([sys.executable, "-m", "msft", *words], stdout=output, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def preprocess(model: str) -> None:
    """Turn the shipped instructions into MindRecord with the model's own chat template."""
    words = ["--dataset_type", "qa", "--input_glob", "configs/quickstart_alpaca.json", "--model_file", model]
    target = OUTPUT.with_suffix(".mindrecord")
    run("llama_preprocess", *words, "--template", "chat", "--seq_length", "80", "--output_file", str(target))


def ask(model: str, engine: str, adapter: Path | None = None) -> list[str]:
    """Return an engine's greedy answers to the three questions."""
    words = ["--model", model, "--backend", engine, "--max_new_tokens", "64"]
    if adapter:
        words += ["--adapter", str(adapter)]
    for question in QUESTIONS:
        words += ["--prompt", question]
    lines = run("generate", *words, capture=True).strip().split("\n")
    return [json.loads(line)["answer"].strip() for line in lines]


def read_losses(log: Path) -> list[float]:
    """Return the loss of every step of a run."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [record["loss"] for record in records if record.get("loss") is not None]


def show_losses(losses: dict[str, list[float]]) -> None:
    """Print the loss curves side by side with their largest difference, and draw them into one picture."""
    engines = list(losses)
    print("\nLoss by step")
    print("step  " + "".join(f"{engine:>12}" for engine in engines) + ("  difference" if len(engines) == 2 else ""))
    differences = [max(row) - min(row) for row in zip(*losses.values(), strict=True)]
    for step, row in enumerate(zip(*losses.values(), strict=True), start=1):
        line = f"{step:>4}  " + "".join(f"{loss:>12.6f}" for loss in row)
        print(line + (f"{differences[step - 1]:>12.1e}" if len(engines) == 2 else ""))
    if len(engines) == 2:
        print(f"largest difference: {max(differences):.2e}")
    picture = OUTPUT / "training_loss.png"
    save_loss_curves(losses, picture)
    print(f"picture: {picture}")


def show_answers(before: dict[str, list[str]], after: dict[str, list[str]]) -> None:
    """Print what each engine answered before and after the training."""
    for number, question in enumerate(QUESTIONS):
        print(f"\n> {question}")
        for engine in before:
            print(f"  {engine}, before: {before[engine][number]}")
            print(f"  {engine}, after:  {after[engine][number]}")


if __name__ == "__main__":
    sys.exit(main())
