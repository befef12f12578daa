"""Rows of JSON that a recipe names are made into MindRecord below its output_dir before a run, once.

Every process of a run comes here: on each machine the first one makes the file, the others wait and find it made.
"""

import contextlib
import fcntl
from pathlib import Path

from msft import console
from msft.config import derive
from msft.config.schema import Recipe
from msft.config.schema_data import RawData, RawFile
from msft.data.columns import Columns
from msft.data.preprocess import Options, preprocess
from msft.data.rows import Source
from msft.errors import InputError
from msft.launch import heartbeat
from msft.train import outputs

FOLDER = "data"
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag")


def made(recipe: Recipe, names: list[str]) -> Recipe:
    """Return the recipe with a MindRecord file in the place of each raw block among the dataset blocks `names`.

    Raises InputError for rows, tokenizers and templates that cannot be read or do not fit each other.
    """
    for name in names:
        block = getattr(recipe, name)
        loader = block.data_loader
        if loader.raw is None or loader.dataset_dir or loader.dataset_files:
            continue
        path = _make(recipe, loader.raw, name)
        found = loader.model_copy(update={"dataset_dir": str(path), "raw": None})
        recipe = recipe.model_copy(update={name: block.model_copy(update={"data_loader": found})})
    return recipe


def sources(raw: RawData) -> list[Source]:
    """Return the files of a raw block with their columns; a folder stands for the .json and .jsonl files in it."""
    found = []
    for entry in raw.files:
        path = Path(entry.path)
        inside = sorted(each for each in path.rglob("*.json*") if each.suffix in (".json", ".jsonl") and each.is_file())
        paths = inside if path.is_dir() else [path]
        columns = _columns(entry, raw.running_text)
        found += [Source(str(each), columns, entry.num_samples) for each in paths]
    return found


def _columns(entry: RawFile, running_text: bool) -> Columns | None:
    """What LLaMA-Factory makes of `columns` and `tags`: where one is written, what it leaves out is not there."""
    if entry.formatting is None:
        return None
    names = {} if entry.columns is None else {key: entry.columns.get(key) for key in _keys(entry, running_text)}
    tags = {} if entry.tags is None else {key: entry.tags.get(key) for key in _TAGS}
    return Columns(is_turns=entry.formatting == "sharegpt", **names, **tags)


def _keys(entry: RawFile, running_text: bool) -> tuple[str, ...]:
    if entry.formatting == "sharegpt":
        return ("messages", "system")
    return ("prompt",) if running_text else ("prompt", "query", "response", "history", "system")


def _make(recipe: Recipe, raw: RawData, name: str) -> Path:
    where = recipe.source.get(f"{name}.data_loader.raw", recipe.name)
    tokenizer = derive.tokenizer(recipe)
    if tokenizer is None:
        raise InputError(f"{where}: {name}.data_loader.raw needs a tokenizer: processor.tokenizer.vocab_file")
    files = sources(raw)
    if not files:
        raise InputError(f"{where}: {name}.data_loader.raw.files: {raw.files[0].path} holds no .json or .jsonl file")
    path = Path(recipe.output_dir, FOLDER, f"{name}.mindrecord")
    encoder = derive.model_spec(recipe).encoder
    options = Options(
        input_glob="",
        model_file=tokenizer,
        output_file=str(path),
        dataset_type="text" if raw.running_text else "qa",
        seq_length=raw.max_length - 1 if raw.max_length else derive.seq_length(recipe),
        template=raw.template if not raw.running_text else Options.template,
        num_workers=raw.num_workers,
        sources=tuple(files),
        last_answer_only=raw.last_answer_only,
        begin=raw.begin,
        end=raw.end,
        decoder_start_id=encoder.start_id if encoder else None,
    )
    heartbeat.beat(0, f"making {path}", patient=True)
    with outputs.writable(path), _alone(path):
        try:
            preprocess(options)
        except InputError as error:
            text = [problem.replace("--template", f"{name}.data_loader.raw.template") for problem in error.problems]
            raise InputError(*(f"{where}: {problem}" for problem in text)) from None
    heartbeat.beat(0, "starting", patient=True)
    return path


@contextlib.contextmanager
def _alone(path: Path):
    """Let one process of this machine at a time make the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            console.warn(f"{path.parent}: cannot be locked ({error.strerror}), so each process may make {path.name}")
        yield
