"""llama_preprocess: files of conversations or running text -> a MindRecord file and a report beside it."""

import os
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from msft import console
from msft.data import qa, rows, wiki
from msft.data.encode import end_mark, stop_ids
from msft.data.mindrecord import MindRecordWriter
from msft.data.parallel import cores
from msft.data.report import Report
from msft.data.templates import DEFAULT_TEMPLATE, open_template
from msft.data.tokenizers import Tokenizer, open_tokenizer
from msft.errors import InputError

DATASET_TYPES = ("qa", "wiki", "wikipedia")


@dataclass(frozen=True)
class Options:
    """MindFormers' arguments of llama_preprocess, `template` and `num_workers` (None: all cores).

    Rows have `seq_length` + 1 tokens. `repeat` is for wiki, `samples_num` for wikipedia, `template` for qa.
    """

    input_glob: str
    model_file: str
    output_file: str
    dataset_type: str = "wiki"
    seq_length: int = 2048
    file_partition: int = 1
    repeat: int = 1
    samples_num: int = 10000
    template: str = DEFAULT_TEMPLATE
    num_workers: int | None = None


def preprocess(options: Options) -> Report:
    """Write the MindRecord file and `<output_file>.report.json`, and print the summary.

    Raises InputError for bad arguments, for files that cannot be read and when no row is left, and then writes nothing.
    """
    _check(options)
    started = time.perf_counter()
    tokenizer = open_tokenizer(options.model_file)
    report = Report(asdict(options) | {"pad_id": tokenizer.pad_id})
    _note_unused(options, report)
    columns = qa.COLUMNS if options.dataset_type == "qa" else wiki.COLUMNS
    write = {"qa": _write_qa, "wiki": _write_wiki, "wikipedia": _write_wikipedia}[options.dataset_type]
    with MindRecordWriter(options.output_file, columns, options.file_partition, options.dataset_type) as writer:
        write(options, tokenizer, report, writer)
        if not report.rows["written"]:
            report.show()
            raise InputError(f"{options.input_glob}: no row is left to write")
    report.seconds = time.perf_counter() - started
    report.write(f"{options.output_file}.report.json")
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


def _note_unused(options: Options, report: Report) -> None:
    for name, meant in (("repeat", "wiki"), ("samples_num", "wikipedia"), ("template", "qa")):
        if getattr(options, name) != getattr(Options, name) and options.dataset_type != meant:
            report.notes.append(f"--{name} is for --dataset_type {meant} and had no effect")


def _write_qa(options: Options, tokenizer: Tokenizer, report: Report, writer: MindRecordWriter) -> None:
    paths = rows.find_files(options.input_glob)
    template = open_template(options.template, tokenizer)
    report.notes.append(_describe(tokenizer, template))
    length, size = options.seq_length + 1, sum(map(os.path.getsize, paths))
    workers = _workers(options, 1 + size // qa.BYTES_PER_WORKER)
    with _progress("KiB of rows", max(1, size >> 10)) as advance:
        for chunk in qa.encode_files(paths, options.model_file, options.template, length, workers):
            writer.write_blobs(chunk.blobs, qa.row_bytes(length))
            qa.add_to(report, chunk)
            advance(chunk.bytes / 1024)


def _write_wiki(options: Options, tokenizer: Tokenizer, report: Report, writer: MindRecordWriter) -> None:
    paths = rows.find_files(options.input_glob)
    workers = _workers(options, 1 + sum(map(os.path.getsize, paths)) // qa.BYTES_PER_WORKER)
    stream = wiki.tokenize(wiki.paragraphs(paths), options.model_file, True, workers)
    with _progress("blocks", None) as advance:
        for block in wiki.blocks(wiki.repeated(stream, options.repeat), options.seq_length + 1):
            _write_block(block, options, report, writer)
            advance(len(block) > options.seq_length)


def _write_wikipedia(options: Options, tokenizer: Tokenizer, report: Report, writer: MindRecordWriter) -> None:
    """MindFormers cuts blocks first and then overwrites two tokens of each with begin and end; here none is lost."""
    folder = Path(options.input_glob)
    paths = rows.find_files(str(folder / "**" / "*.parquet") if folder.is_dir() else options.input_glob)
    before, after = wiki.borders(tokenizer)
    inner = options.seq_length + 1 - len(before) - len(after)
    if inner < 1:
        raise InputError(f"--seq_length {options.seq_length} leaves no room between begin and end token")
    workers = _workers(options, 1 + sum(map(os.path.getsize, paths)) // qa.BYTES_PER_WORKER)
    passes = 0
    with _progress("blocks", options.samples_num) as advance:
        while report.rows["written"] < options.samples_num:
            passes, had = passes + 1, report.rows["written"]
            stream = wiki.tokenize(wiki.lines(paths), options.model_file, False, workers)
            for block in wiki.blocks(stream, inner):
                if len(block) == inner:
                    block = np.concatenate((before, block, after)).astype(np.int32)
                _write_block(block, options, report, writer)
                advance(len(block) > options.seq_length)
                if report.rows["written"] == options.samples_num:
                    break
            if report.rows["written"] == had:
                return
    report.notes.append(f"--samples_num {options.samples_num}: the text was read {passes} times")


def _write_block(block: np.ndarray, options: Options, report: Report, writer: MindRecordWriter) -> None:
    if len(block) <= options.seq_length:
        report.tokens["cut_off"] += len(block)
        return
    report.rows.update(read=1, written=1)
    report.tokens.update(written=len(block), supervised=len(block) - 1)
    writer.write({"input_ids": block})


def _workers(options: Options, useful: int) -> int:
    return min(options.num_workers or cores(), useful)


def _describe(tokenizer: Tokenizer, template) -> str:
    mark = end_mark(tokenizer, template)
    stops = ", ".join(map(str, stop_ids(tokenizer, template))) or "none"
    if mark:
        return f"template {template.name}: an answer ends with {mark!r} (stop ids: {stops})"
    if tokenizer.eos_id is None:
        return f"template {template.name}: nothing marks the end of an answer, and the tokenizer has no end token"
    return f"template {template.name}: no end mark of its own, so the end token is added (stop ids: {stops})"


@contextmanager
def _progress(what: str, total: int | None):
    with console.progress() as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
