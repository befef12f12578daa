"""Conversations in files -> rows of ids and labels, on several processes."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from msft.backend.contract import IGNORE
from msft.data import rows
from msft.data.encode import Encoder
from msft.data.formats import BadRow, conversation
from msft.data.parallel import in_order
from msft.data.report import Dropped, Report
from msft.data.templates import open_template
from msft.data.tokenizers import open_tokenizer

COLUMNS = {"input_ids": "int32", "labels": "int32"}
# A process takes about a second to start: it must have more than that to do.
BYTES_PER_WORKER = 1 << 21
UNSUPERVISED = "nothing supervised is left"


class Encoded(NamedTuple):
    """What became of one chunk: its rows' tokens end to end, their lengths, and the report's figures."""

    ids: np.ndarray
    labels: np.ndarray
    lengths: list[int]
    rows: Counter
    tokens: Counter
    remarks: Counter
    dropped: list[Dropped]
    bytes: int


def encode_files(paths: list[str], model_file: str, template: str, length: int, workers: int) -> Iterator[Encoded]:
    """Yield the encoded chunks of all files in order; rows are cut at `length` tokens.

    Rows that cannot be read and rows without a supervised token are left out and listed in `dropped`.
    """
    tasks = (chunk for path in paths for chunk in rows.chunks(path))
    return in_order(_chunk_encoder, (model_file, template, length), tasks, workers)


def _chunk_encoder(model_file: str, template: str, length: int):
    tokenizer = open_tokenizer(model_file)
    return partial(encode_chunk, Encoder(tokenizer, open_template(template, tokenizer)), length)


def encode_chunk(encoder: Encoder, length: int, chunk: rows.Chunk) -> Encoded:
    """Encode the rows of one chunk."""
    numbers, conversations = [], []
    counts, tokens, remarks, dropped = Counter(), Counter(), Counter(), []
    for number, row in rows.rows(chunk):
        counts["read"] += 1
        try:
            if isinstance(row, BadRow):
                raise row
            conversations.append(conversation(row))
            numbers.append(number)
        except BadRow as reason:
            dropped.append(Dropped(chunk.path, number, str(reason)))
    ids, labels = [], []
    for number, example in zip(numbers, encoder.encode(conversations), strict=True):
        if isinstance(example, BadRow):
            dropped.append(Dropped(chunk.path, number, str(example)))
            continue
        kept = example.labels[:length]
        remarks.update(example.remarks)
        # Nothing predicts the first token, so its label teaches nothing.
        supervised = int((kept[1:] != IGNORE).sum())
        counts["cut"] += len(example.ids) > length
        tokens["cut_off"] += max(0, len(example.ids) - length)
        if not supervised:
            counts["without_supervision"] += 1
            dropped.append(Dropped(chunk.path, number, UNSUPERVISED))
            continue
        tokens.update(supervised=supervised, written=len(kept))
        ids.append(example.ids[:length])
        labels.append(kept)
    counts["bad"] = len(dropped) - counts["without_supervision"]
    counts["written"] = len(ids)
    joined = [np.concatenate(column) if column else np.zeros(0, np.int32) for column in (ids, labels)]
    dropped.sort(key=lambda each: each.row)
    size = chunk.end - chunk.start
    return Encoded(*joined, [len(row) for row in ids], counts, tokens, remarks, dropped, size)


def padded_rows(chunk: Encoded, length: int, pad_id: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield a chunk's rows, padded on the right to `length` with `pad_id` and the label -100."""
    start = 0
    for size in chunk.lengths:
        ids, labels = np.full(length, pad_id, np.int32), np.full(length, IGNORE, np.int32)
        ids[:size], labels[:size] = chunk.ids[start : start + size], chunk.labels[start : start + size]
        start += size
        yield {"input_ids": ids, "labels": labels}


def add_to(report: Report, chunk: Encoded, length: int) -> None:
    """Add a chunk's figures to the report."""
    report.rows.update(chunk.rows)
    report.tokens.update(chunk.tokens)
    report.tokens["padding"] += len(chunk.lengths) * length - len(chunk.ids)
    report.remarks.update(chunk.remarks)
    report.dropped.extend(chunk.dropped)
