"""Question 4: alpaca JSON to MindRecord, against LLaMA-Factory's cache, MindFormers' way and the bare tokenizer."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common.answer import Answer, Figure, Verdict, absolute, compare
from benchmarks.common.process import run
from benchmarks.common.repeat import interleave
from benchmarks.common.rows import LENGTH, write_alpaca
from benchmarks.common.settings import Settings
from benchmarks.common.training import OFFLINE
from benchmarks.peers import environments

QUESTION = "alpaca JSON to MindRecord: rows/s and memory"
MANY, FEW, SLOW = 50_000, 5_000, 1_000
VOCABULARY = 8000
FOLDER = Path(__file__).parent
OURS, OURS_FEW = f"msft, {MANY} rows", f"msft, {FEW} rows"
FACTORY, FACTORY_WHOLE = f"LLaMA-Factory, {MANY} rows", f"LLaMA-Factory with its start, {MANY} rows"
BARE = f"bare tokenizers, {MANY} rows"
SENTENCEPIECE, MINDFORMERS = f"msft, sentencepiece, {FEW} rows", f"MindFormers' way, {SLOW} rows"
# A little memory grows with the number of chunks that wait.
FLAT = 1.05


def measure(settings: Settings) -> Answer:
    """Tokenise repeated, slightly different rows in turns."""
    folder = settings.work / "tokenising"
    folder.mkdir(parents=True, exist_ok=True)
    files = {count: folder / f"alpaca-{count}.json" for count in (MANY, FEW, SLOW)}
    for count, path in files.items():
        write_alpaca(settings.data, path, count)
    vocabulary = sentencepiece_model(settings.data, folder)
    runs = interleave(variants(settings, folder, files, vocabulary), settings.repeats)
    figures = {name: figure(name, repeats) for name, repeats in runs.items()}
    whole = [MANY / run["whole"] for run in runs[FACTORY]]
    figures[FACTORY_WHOLE] = Figure(FACTORY_WHOLE, "rows/s", whole, figures[FACTORY].peaks)
    return Answer(QUESTION, list(figures.values()), verdicts(figures), NOTES, runs)


def variants(settings: Settings, folder: Path, files: dict[int, Path], vocabulary: Path) -> dict[str, partial]:
    """Return what is measured, by name."""
    model, length = settings.model, str(LENGTH)
    factory, mindformers = environments.python("llamafactory"), environments.python("mindformers")
    chat = ["--template", "chat", "--model_file", model]
    bare = [sys.executable, FOLDER / "programs" / "bare_tokenizer.py", model, files[MANY]]
    cached = [factory, FOLDER / "peers" / "llamafactory_tokenise.py", model, files[MANY], length]
    slow = [mindformers, FOLDER / "peers" / "mindformers_tokenise.py", vocabulary, files[SLOW], length]
    return {
        OURS: partial(whole_command, files[MANY], MANY, folder, chat),
        OURS_FEW: partial(whole_command, files[FEW], FEW, folder, chat),
        SENTENCEPIECE: partial(whole_command, files[FEW], FEW, folder, ["--model_file", vocabulary]),
        BARE: partial(own_clock, bare, MANY),
        FACTORY: partial(own_clock, cached, MANY),
        MINDFORMERS: partial(own_clock, slow, SLOW),
    }


def whole_command(source: Path, count: int, folder: Path, words: Sequence) -> dict:
    """Run llama_preprocess, from the shell to the finished file."""
    command = [sys.executable, "-m", "msft", "llama_preprocess", "--dataset_type", "qa", "--seq_length", str(LENGTH)]
    # A new folder: an output that is there already, made from the same rows, would not be made again.
    with TemporaryDirectory(dir=folder) as new:
        ran = run([*command, "--input_glob", source, "--output_file", Path(new) / "rows.mindrecord", *words])
    return {"rows_per_second": count / ran.seconds, "peak": ran.peak, "seconds": ran.seconds}


def own_clock(command: Sequence, count: int) -> dict:
    """Run a program that prints its own seconds, which leave its imports and its loading out."""
    # An empty cache: LLaMA-Factory would otherwise find what the repeat before it read.
    with TemporaryDirectory() as cache:
        ran = run(command, environment=OFFLINE | {"HF_DATASETS_CACHE": cache})
    seconds = json.loads(ran.out.splitlines()[-1])["seconds"]
    return {"rows_per_second": count / seconds, "peak": ran.peak, "seconds": seconds, "whole": ran.seconds}


def figure(name: str, repeats: Sequence[dict]) -> Figure:
    """Return rows/s and peaks."""
    return Figure(name, "rows/s", [run["rows_per_second"] for run in repeats], [run["peak"] for run in repeats])


def sentencepiece_model(data: Path, folder: Path) -> Path:
    """Train a model of Llama's kind on the data, which stands in for Llama's own."""
    import sentencepiece

    text, prefix = folder / "text.txt", folder / "vocabulary"
    text.write_text(" ".join(f"{row['instruction']}\n{row['output']}\n" for row in json.loads(data.read_text())))
    settings = {"model_type": "bpe", "byte_fallback": True, "vocab_size": VOCABULARY, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(prefix), **settings)
    return prefix.with_suffix(".model")


def verdicts(figures: dict[str, Figure]) -> list[Verdict]:
    """Return the issue's bars."""
    many, few = figures[OURS], figures[OURS_FEW]
    return [
        compare("rows/s against LLaMA-Factory's cache", many, figures[FACTORY], 10, True),
        compare("rows/s against LLaMA-Factory's cache with its start", many, figures[FACTORY_WHOLE], 10, True),
        compare("rows/s against the bare tokenizer", many, figures[BARE], 0.9, True),
        absolute(f"memory at {MANY} rows over memory at {FEW}", many.peak / few.peak, "x", FLAT),
    ]


NOTES = [
    "Ours is the whole command, from the shell to the finished file; the others leave out their start and loading, "
    "except where it says so.",
    "The bare tokenizer: the faster of encode_batch's own threads and two processes.",
    "LLaMA-Factory tokenises with 2 processes and writes its cache.",
    "MindFormers' way: its own LlamaTokenizer in its own environment, conversation by conversation, each round "
    "tokenised three times, on a sentencepiece model trained on the data; ours with the same model stands beside.",
]
