"""Runs the questions and writes what came out: a table, JSON with every number, a picture of the ratios.

usage: python -m benchmarks.run [QUESTION ...] --data alpaca.json [--model DIR] [--repeats 3] [--list]
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.common import machine, report
from benchmarks.common.answer import Answer
from benchmarks.common.process import Failed
from benchmarks.common.settings import ROOT, Settings
from benchmarks.peers import environments

QUESTIONS = {
    "lora_torch": "LoRA fine-tuning on torch against Trainer, TRL and LLaMA-Factory",
    "lora_mindspore": "the same on MindSpore, against our torch engine and the real MindFormers",
    "machine_limit": "share of the machine's matrix-product rate",
    "tokenising": "alpaca JSON to MindRecord",
    "conversion": "Hugging Face weights to CKPT and back",
    "startup": "seconds and memory until a command answers",
    "generation": "generated tokens per second",
    "growth": "time and memory against rows, length, layers and LoRA rank",
}
LEAST_ROWS = 32
BENCHMARKS = ROOT / "benchmarks"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    words = parser().parse_args(argv)
    if words.list:
        width = max(map(len, QUESTIONS))
        print("\n".join(f"{name:<{width}}  {what}" for name, what in QUESTIONS.items()))
        return 0
    settings = settings_of(words)
    answers, failed = {}, []
    for name in words.questions or QUESTIONS:
        print(f"{name}: {QUESTIONS[name]}", file=sys.stderr, flush=True)
        try:
            answers[name] = import_module(f"benchmarks.{name}").measure(settings)
        except Failed as failure:
            print(f"error: {name}: {failure}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        # After every question: what is measured stays when a later one fails.
        write(settings.results, answers)
        print(report.text(name, answers[name]), flush=True)
    if failed:
        print(f"error: not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    result = argparse.ArgumentParser(prog="benchmarks", description="Measure msft against other toolkits.")
    add = result.add_argument
    add("questions", nargs="*", metavar="QUESTION", help="which questions (default: all; see --list)")
    add("--list", action="store_true", help="name the questions")
    add("--data", type=Path, default=os.environ.get("DATA"), help="alpaca rows, a JSON list (or the variable DATA)")
    add("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct", help="a Hugging Face folder")
    add("--repeats", type=int, default=3, help="how often everything is measured (default: 3)")
    add("--rows", type=int, default=48, help="rows that a training run sees (default: 48)")
    add("--work", type=Path, default=BENCHMARKS / ".work", help="where runs write; conversion takes 25 GB")
    add("--output", type=Path, default=BENCHMARKS / "results", help="where table, JSON and picture go")
    return result


def settings_of(words: argparse.Namespace) -> Settings:
    """Check the arguments before hours are spent."""
    unknown = [name for name in words.questions if name not in QUESTIONS]
    if unknown:
        sys.exit(f"error: no question is named {', '.join(unknown)} (known: {', '.join(QUESTIONS)})")
    if words.rows < LEAST_ROWS:
        sys.exit(f"error: --rows {words.rows}: {LEAST_ROWS} at least, for a packed run of more than its first step")
    if words.data is None:
        sys.exit("error: --data alpaca.json (or DATA=alpaca.json): which alpaca rows?")
    for path, hint in ((words.data, ""), (words.model / "config.json", " (make model fetches it)")):
        if not Path(path).is_file():
            sys.exit(f"error: there is no {path}{hint}")
    words.output.mkdir(parents=True, exist_ok=True)
    work, results = words.work.resolve(), words.output.resolve()
    return Settings(words.model.resolve(), Path(words.data).resolve(), words.repeats, words.rows, work, results)


def write(folder: Path, answers: dict[str, Answer]) -> None:
    """Write table, JSON and picture of the questions answered so far."""
    pythons = {name: environments.place(name) / "bin" / "python" for name in environments.REQUIREMENTS}
    described = machine.describe(ROOT, {name: path for name, path in pythons.items() if path.exists()})
    report.write_json(folder / "results.json", answers, described)
    texts = [report.text(name, answer) for name, answer in answers.items()]
    (folder / "results.md").write_text("\n".join(texts), encoding="utf-8")
    report.draw(folder / "ratios.png", answers)


if __name__ == "__main__":
    sys.exit(main())
