"""Conversations in files -> rows of ids and labels, on several processes."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from msft.backend.contract import IGNORE
from msft.data import rows
from msft.data.encode import Encoder
from msft.data.formats import BadRow, conversation
from msft.data.mindrecord import codec
from msft.data.parallel import in_order
from msft.data.report import Dropped, Report
from msft.data.seq2seq import Seq2SeqEncoder
from msft.data.templates import open_template
from msft.data.tokenizers import open_tokenizer

COLUMNS = {"input_ids": "int32", "labels": "int32"}
# A process takes about a second to start: it must have more than that to do.
BYTES_PER_WORKER = 1 << 21
UNSUPERVISED = "nothing supervised is left"


class Encoded(NamedTuple):
    """What became of one chunk: its rows as MindRecord stores them, and the report's figures."""

    blobs: list[bytes]
    rows: Counter
    tokens: Counter
    remarks: Counter
    dropped: list[Dropped]
    bytes: int


def encode_files(
    sources: list[rows.Source],
    model_file: str,
    template: str,
    length: int,
    workers: int,
    last_answer_only: bool = False,
    start_id: int | None = None,
) -> Iterator[Encoded]:
    """Yield the encoded chunks of all files in order.

    Rows are cut at `length` tokens, or padded on the right to as many with the padding token and the label -100.
    With `start_id` they are examples for an encoder-decoder whose decoding starts with it (`seq2seq`).
    Rows that cannot be read and rows without a supervised token are left out and listed in `dropped`.
    """
    tasks = ((chunk, source) for source in sources for chunk in source.chunks())
    return in_order(_chunk_encoder, (model_file, template, length, last_answer_only, start_id), tasks, workers)


def _chunk_encoder(model_file: str, template: str, length: int, last_answer_only: bool, start_id: int | None):
    tokenizer = open_tokenizer(model_file)
    template = open_template(template, tokenizer)
    if start_id is None:
        encoder = Encoder(tokenizer, template, last_answer_only)
    else:
        encoder = Seq2SeqEncoder(tokenizer, template, start_id, last_answer_only)
    return lambda task: encode_chunk(encoder, length, tokenizer.pad_id, *task)


def encode_chunk(
    encoder: Encoder | Seq2SeqEncoder, length: int, pad_id: int, chunk: rows.Chunk, source: rows.Source | None = None
) -> Encoded:
    """Encode the rows of one chunk, which `source` says how to read."""
    source = source or rows.Source(chunk.path)
    read = source.columns.conversation if source.columns else conversation
    numbers, conversations, dropped = [], [], []
    count = Counter(read=0)
    for number, row in source.rows(chunk):
        count["read"] += 1
        try:
            if isinstance(row, BadRow):
                raise row
            parts = encoder.parts(read(row))
            conversations += parts
            numbers += [number] * len(parts)
        except BadRow as reason:
            dropped.append(Dropped(chunk.path, number, str(reason)))
    kept, tokens, remarks = [], Counter(), Counter()
    for number, example in zip(numbers, encoder.encode(conversations), strict=True):
        if isinstance(example, BadRow):
            dropped.append(Dropped(chunk.path, number, str(example)))
            continue
        excess = len(example.ids) - length
        if example.remarks:
            remarks.update(example.remarks)
        if excess > 0:
            count["cut"] += 1
            tokens["cut_off"] += excess
        ids, labels, _ = encoder.cut(example, length)
        # Nothing predicts the first token, so its label teaches nothing.
        supervised = np.count_nonzero(labels[1:] != IGNORE)
        if not supervised:
            count["without_supervision"] += 1
            dropped.append(Dropped(chunk.path, number, UNSUPERVISED))
            continue
        tokens["supervised"] += supervised
        kept.append((ids, labels))
    count["bad"] = len(dropped) - count["without_supervision"]
    count["written"] = len(kept)
    tokens["written"] = sum(len(ids) for ids, _ in kept)
    tokens["padding"] = len(kept) * length - tokens["written"]
    dropped.sort(key=lambda each: each.row)
    return Encoded(_blobs(kept, length, pad_id), count, tokens, remarks, dropped, chunk.end - chunk.start)


def _blobs(kept: list[tuple[np.ndarray, np.ndarray]], length: int, pad_id: int) -> list[bytes]:
    """Return rows of (ids, labels), padded, as MindRecord stores them: the columns in the order of their names."""
    if not kept:
        return []
    counts = np.array([len(ids) for ids, _ in kept])
    columns = [np.concatenate(column) for column in zip(*kept, strict=True)]
    packed = [
        codec.compress_padded(values, counts, length, padding)
        for values, padding in zip(columns, (pad_id, IGNORE), strict=True)
    ]
    return [codec.join(row) for row in zip(*packed, strict=True)]


def row_bytes(length: int) -> int:
    """Return the bytes of the arrays of a row of `length` tokens."""
    return len(COLUMNS) * np.dtype(np.int32).itemsize * length


def add_to(report: Report, chunk: Encoded) -> None:
    """Add a chunk's figures to the report."""
    report.rows.update(chunk.rows)
    report.tokens.update(chunk.tokens)
    report.remarks.update(chunk.remarks)
    report.dropped.extend(chunk.dropped)
