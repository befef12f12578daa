"""A file written past the page cache holds exactly what was written, and a refusal of the disk is not lost."""

import errno
import os
import threading

import numpy as np
import pytest

from msft.convert import direct_file
from msft.convert.direct_file import DirectFile

BLOCK = 8192


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(direct_file, "BLOCK_BYTES", BLOCK)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 9 * BLOCK, 20 * BLOCK + 4097])
def test_content_is_what_was_written(tmp_path, size):
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    piece = np.empty(5000, np.uint8)
    with DirectFile(tmp_path / "x") as file:
        for start in range(0, size, 5000):
            part = content[start : start + 5000]
            piece[: len(part)] = part
            assert file.write(piece[: len(part)]) == len(part)
            piece[:] = 7  # what was given may change at once
            assert file.tell() == start + len(part)
        assert file.write(b"end") == 3
        assert file.write(b"") == 0
    assert (tmp_path / "x").read_bytes() == content.tobytes() + b"end"


def test_one_write_of_many_blocks_replaces_an_older_file(tmp_path):
    (tmp_path / "x").write_bytes(bytes(50 * BLOCK))
    content = np.random.default_rng(0).bytes(10 * BLOCK + 5)
    with DirectFile(tmp_path / "x") as file:
        file.write(content)
    assert (tmp_path / "x").read_bytes() == content


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    with DirectFile(tmp_path / "x") as file:
        file.write(b"x")
    (tmp_path / "y").write_bytes(b"x")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_a_file_system_that_cannot_pass_its_cache_is_written_in_the_usual_way(tmp_path, monkeypatch):
    real = os.write

    def write(descriptor, view):
        if direct_file._is_direct(descriptor):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, view[:1000])  # and in parts

    monkeypatch.setattr(os, "write", write)
    content = np.random.default_rng(0).bytes(6 * BLOCK + 5)
    with DirectFile(tmp_path / "x") as file:
        file.write(content)
    assert (tmp_path / "x").read_bytes() == content


@pytest.mark.parametrize("blocks", [1, 2, 10])
def test_a_refused_block_is_raised_here(tmp_path, monkeypatch, blocks):
    def full(descriptor, view):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left on device"):
        with DirectFile(tmp_path / "x") as file:
            file.write(bytes(blocks * BLOCK))
    assert threading.active_count() == before


def test_a_failure_of_the_writer_is_the_one_that_is_seen(tmp_path):
    with pytest.raises(KeyError, match="mine"):
        with DirectFile(tmp_path / "x") as file:
            file.write(bytes(3 * BLOCK + 1))
            raise KeyError("mine")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file.descriptor)
