"""llama_preprocess: files of conversations or running text -> a MindRecord file and a report beside it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msft import console
from msft.data import origin, qa, rows, wiki
from msft.data.columns import Columns
from msft.data.ends import PROBE, answer_ends
from msft.data.formats import BadRow
from msft.data.mindrecord import MindRecordWriter
from msft.data.mindrecord.writer import shard_paths
from msft.data.parallel import cores
from msft.data.report import Report
from msft.data.templates import decoder_start_beside, default_template, model_type_beside, open_template
from msft.data.tokenizers import Tokenizer, open_tokenizer
from msft.errors import InputError

DATASET_TYPES = ("qa", "wiki", "wikipedia", "text")


@dataclass(frozen=True)
class Options:
    """MindFormers' arguments of llama_preprocess, `template`, `num_workers` (None: all cores) and `overwrite`.

    Rows have `seq_length` + 1 tokens. `repeat` is for wiki, `samples_num` for wikipedia, `template` ('' = the
    tokenizer's own, else the one of the model family beside it) and `last_answer_only` for qa. `text` cuts running
    text in JSON rows into blocks, each text with the tokenizer's begin tokens before it (`begin`) and the end token
    behind it (`end`). `decoder_start_id` (None: what the config.json beside the tokenizer says) makes rows for an
    encoder-decoder, a source and an answer each, of qa alone. `sources`, for qa and text, stand in the place of
    `input_glob`.
    """

    input_glob: str
    model_file: str
    output_file: str
    dataset_type: str = "wiki"
    seq_length: int = 2048
    file_partition: int = 1
    repeat: int = 1
    samples_num: int = 10000
    template: str = ""
    num_workers: int | None = None
    overwrite: bool = False
    sources: tuple[rows.Source, ...] = ()
    last_answer_only: bool = False
    begin: bool = True
    end: bool = True
    decoder_start_id: int | None = None


class _Job(NamedTuple):
    options: Options
    sources: list[rows.Source]
    tokenizer: Tokenizer
    template: object
    report: Report


def preprocess(options: Options) -> Report | None:
    """Write the MindRecord file and `<output_file>.report.json`, and print the summary.

    Where both are there already, made from the same data, tokenizer and options, this is said and None returned,
    unless `overwrite` is set.

    Raises InputError for bad arguments, for files that cannot be read and when no row is left, and then writes nothing.
    """
    _check(options)
    started = time.perf_counter()
    tokenizer = open_tokenizer(options.model_file)
    _check_answers(options, tokenizer)
    options = _for_encoder(options)
    sources = list(options.sources) or [rows.Source(path) for path in _input_files(options)]
    given, template = options, None
    if options.dataset_type == "qa":
        name = options.template or default_template(tokenizer, model_type_beside(options.model_file))
        options, template = replace(options, template=name), open_template(name, tokenizer)
    report = Report(_recorded(options) | {"pad_id": tokenizer.pad_id})
    report_path, outputs = Path(f"{options.output_file}.report.json"), _outputs(options)
    made_from = origin.origin([source.path for source in sources], options.model_file, _settings(options, template))
    if not options.overwrite and origin.is_made(report_path, made_from, outputs):
        console.say(f"{options.output_file}: is there already, made from the same data, tokenizer and options")
        anew = "remove it to have it made anew" if options.sources else "--overwrite makes it anew"
        console.say(f"what became of each row: {report_path}; {anew}")
        return None
    _note_unused(given, report)
    columns = qa.COLUMNS if template else wiki.COLUMNS
    kinds = {"qa": _write_qa, "wiki": _write_wiki, "wikipedia": _write_wikipedia, "text": _write_text}
    write, job = kinds[options.dataset_type], _Job(options, sources, tokenizer, template, report)
    with MindRecordWriter(options.output_file, columns, options.file_partition, options.dataset_type) as writer:
        write(job, writer)
        if not report.rows["written"]:
            report.show()
            raise InputError(f"{options.input_glob or sources[0].path}: no row is left to write")
    if made_from.is_unchanged():
        report.origin = origin.record(made_from, outputs)
    else:
        report.notes.append("the data changed while it was read, so that the next run will make the output anew")
    report.seconds = time.perf_counter() - started
    report.write(report_path)
    report.show()
    return report


def _check(options: Options) -> None:
    problems = []
    for name in ("seq_length", "file_partition", "repeat", "samples_num", "num_workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"--{name} must be 1 or more, not {value}")
    if options.dataset_type not in DATASET_TYPES:
        problems.append(f"--dataset_type {options.dataset_type!r} must be one of {', '.join(DATASET_TYPES)}")
    if os.path.isdir(options.output_file):
        problems.append(f"--output_file {options.output_file!r} is a folder")
    if problems:
        raise InputError(*problems)


def _check_answers(options: Options, tokenizer: Tokenizer) -> None:
    if tokenizer.answer_ids and options.dataset_type != "qa":
        raise InputError(
            f"--dataset_type {options.dataset_type}: running text has no answers, and this tokenizer's model reads "
            "what is before them in both directions, so that it would see what it is to learn; use qa"
        )


def _for_encoder(options: Options) -> Options:
    """The options with the start token of the encoder-decoder that the tokenizer is of, if it is one's."""
    start = options.decoder_start_id
    start = decoder_start_beside(options.model_file) if start is None else start
    if start is not None and options.dataset_type != "qa":
        raise InputError(
            f"--dataset_type {options.dataset_type}: running text has no answers, which an encoder-decoder learns from "
            "their sources; use qa"
        )
    return replace(options, decoder_start_id=start)


def _note_unused(options: Options, report: Report) -> None:
    for name, meant in (("repeat", "wiki"), ("samples_num", "wikipedia"), ("template", "qa")):
        if getattr(options, name) != getattr(Options, name) and options.dataset_type != meant:
            report.notes.append(f"--{name} is for --dataset_type {meant} and had no effect")


def _input_files(options: Options) -> list[str]:
    folder = Path(options.input_glob)
    parquet = options.dataset_type == "wikipedia" and folder.is_dir()
    return rows.find_files(str(folder / "**" / "*.parquet") if parquet else options.input_glob)


def _outputs(options: Options) -> list[Path]:
    data = shard_paths(Path(options.output_file), options.file_partition)
    return [Path(f"{path}{suffix}") for path in data for suffix in ("", ".db")]


# What llama_preprocess has no flag for: recorded where it is not the default.
_BEYOND_FLAGS = ("sources", "last_answer_only", "begin", "end", "decoder_start_id")


def _recorded(options: Options) -> dict:
    values = {name: value for name, value in asdict(options).items() if name != "overwrite"}
    plain = [name for name in _BEYOND_FLAGS if values[name] == getattr(Options, name)]
    return {name: value for name, value in values.items() if name not in plain}


def _settings(options: Options, template) -> dict:
    """Return what the output depends on besides the files' bytes."""
    elsewhere = ("input_glob", "model_file", "output_file", "num_workers")
    settings = {name: value for name, value in _recorded(options).items() if name not in elsewhere}
    if options.sources:
        settings["sources"] = [source[1:] for source in options.sources]
    if template is None:
        return settings
    try:
        shown = template.render(None, PROBE.turns)  # which may hold the date
    except BadRow as refusal:
        shown = str(refusal)
    return settings | {"template_source": template.source, "template_shown": shown}


def _write_qa(job: _Job, writer: MindRecordWriter) -> None:
    options, report = job.options, job.report
    report.notes.append(_describe(job.tokenizer, job.template))
    length, size = options.seq_length + 1, sum(map(os.path.getsize, _paths(job)))
    words = (job.sources, options.model_file, options.template, length, _workers(job), options.last_answer_only)
    if options.decoder_start_id is not None:
        report.notes.append(
            f"for an encoder-decoder: sources, then its start token {options.decoder_start_id}, answers"
        )
    with _progress("KiB of rows", max(1, size >> 10)) as advance:
        for chunk in qa.encode_files(*words, options.decoder_start_id):
            writer.write_blobs(chunk.blobs, qa.row_bytes(length))
            qa.add_to(report, chunk)
            advance(chunk.bytes / 1024)


def _write_wiki(job: _Job, writer: MindRecordWriter) -> None:
    options = job.options
    stream = wiki.tokenize(wiki.paragraphs(_paths(job)), options.model_file, True, _workers(job))
    with _progress("blocks", None) as advance:
        for block in wiki.blocks(wiki.repeated(stream, options.repeat), options.seq_length + 1):
            _write_block(job, block, writer)
            advance(len(block) > options.seq_length)


def _write_wikipedia(job: _Job, writer: MindRecordWriter) -> None:
    """MindFormers cuts blocks first and then overwrites two tokens of each with begin and end; here none is lost."""
    options, report = job.options, job.report
    before, after = wiki.borders(job.tokenizer)
    inner = options.seq_length + 1 - len(before) - len(after)
    if inner < 1:
        raise InputError(f"--seq_length {options.seq_length} leaves no room between begin and end token")
    passes = 0
    with _progress("blocks", options.samples_num) as advance:
        while report.rows["written"] < options.samples_num:
            passes, had = passes + 1, report.rows["written"]
            stream = wiki.tokenize(wiki.lines(_paths(job)), options.model_file, False, _workers(job))
            for block in wiki.blocks(stream, inner):
                if len(block) == inner:
                    block = np.concatenate((before, block, after)).astype(np.int32)
                _write_block(job, block, writer)
                advance(len(block) > options.seq_length)
                if report.rows["written"] == options.samples_num:
                    break
            if report.rows["written"] == had:
                return
    report.notes.append(f"--samples_num {options.samples_num}: the text was read {passes} times")


def _write_text(job: _Job, writer: MindRecordWriter) -> None:
    options = job.options
    stream = wiki.tokenize(_texts(job), options.model_file, (options.begin, options.end), _workers(job))
    with _progress("blocks", None) as advance:
        for block in wiki.blocks(stream, options.seq_length + 1):
            _write_block(job, block, writer)
            advance(len(block) > options.seq_length)


def _texts(job: _Job) -> Iterator[str]:
    """The texts of all rows; rows without one are listed in the report."""
    for source in job.sources:
        read = (source.columns or Columns(prompt="text")).running_text
        for chunk in source.chunks():
            for number, row in source.rows(chunk):
                try:
                    if isinstance(row, BadRow):
                        raise row
                    yield read(row)
                except BadRow as reason:
                    job.report.drop_bad(source.path, number, str(reason))


def _write_block(job: _Job, block: np.ndarray, writer: MindRecordWriter) -> None:
    report = job.report
    if len(block) <= job.options.seq_length:
        report.tokens["cut_off"] += len(block)
        return
    report.rows.update(read=1, written=1)
    report.tokens.update(written=len(block), supervised=len(block) - 1)
    writer.write({"input_ids": block})


def _paths(job: _Job) -> list[str]:
    return [source.path for source in job.sources]


def _workers(job: _Job) -> int:
    useful = 1 + sum(map(os.path.getsize, _paths(job))) // qa.BYTES_PER_WORKER
    return min(job.options.num_workers or cores(), useful)


def _describe(tokenizer: Tokenizer, template) -> str:
    ends = answer_ends(tokenizer, template)
    stops = ", ".join(map(str, ends.ids)) or "none"
    if ends.mark:
        return f"template {template.name}: an answer ends with {ends.mark!r} (stop ids: {stops})"
    if tokenizer.eos_id is None:
        return f"template {template.name}: nothing marks the end of an answer, and the tokenizer has no end token"
    return f"template {template.name}: no end mark of its own, so the end token is added (stop ids: {stops})"


@contextmanager
def _progress(what: str, total: int | None):
    with console.progress() as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
