"""Tensors come out of files piece by piece as they lie there, though the next piece is read ahead of the caller."""

import threading
from pathlib import Path

import numpy as np
import pytest

from msft.convert import stored
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored, StoredTensors
from msft.errors import InputError

PIECE = 64


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(stored, "PIECE_BYTES", PIECE)


def source(path: Path, numbers: int, extents: tuple[tuple[int, int], ...]) -> StoredTensors:
    return StoredTensors({"a": Stored(TensorInfo((numbers,), "int16"), path, extents)})


@pytest.mark.parametrize("numbers", [0, 1, 31, 32, 33, 64, 1000])
def test_every_piece_is_whole_until_the_next_is_asked_for(tmp_path, numbers):
    content = np.arange(numbers, dtype=np.int16)
    first = numbers // 3 * 2  # bytes of the first of two extents, which lie in the other order
    raw = content.tobytes()
    (tmp_path / "x").write_bytes(raw[first:] + b"??" + raw[:first])
    extents = ((len(raw) - first + 2, first), (0, len(raw) - first))
    pieces = []
    for piece in source(tmp_path / "x", numbers, extents).parts("a"):
        assert piece.nbytes <= PIECE
        pieces.append(piece.copy())
    assert np.array_equal(np.concatenate([*pieces, content[:0]]), content)


def test_a_file_that_ends_early_is_one_error_after_the_pieces_before(tmp_path):
    (tmp_path / "x").write_bytes(bytes(2 * PIECE + 10))
    pieces = source(tmp_path / "x", 1000, ((0, 2000),)).parts("a")
    assert next(pieces).nbytes == next(pieces).nbytes == PIECE
    with pytest.raises(InputError, match="x: ends inside tensor 'a' \\(byte 138\\)"):
        next(pieces)


def test_a_caller_that_stops_leaves_no_thread(tmp_path):
    (tmp_path / "x").write_bytes(bytes(2000))
    before = threading.active_count()
    pieces = source(tmp_path / "x", 1000, ((0, 2000),)).parts("a")
    next(pieces)
    pieces.close()
    assert threading.active_count() == before
