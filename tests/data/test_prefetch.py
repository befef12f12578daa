"""Items are made ahead in their order, errors come in their turn, and no thread is left."""

import threading
import time

import numpy as np
import pytest

from msft.data.batches import BatchStream
from msft.data.mindrecord import MindRecordWriter, open_mindrecord
from msft.data.prefetch import prefetch
from msft.errors import InputError
from tests.data.numbered_rows import PAD


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_keeps_the_order_and_its_bound():
    """With depth 3 at most 3 items exist that nobody has taken yet."""
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    ahead, taken = prefetch(items(), 3), []
    for number in ahead:
        taken.append(number)
        time.sleep(0.005)
        assert len(made) <= len(taken) + 3
    assert taken == list(range(20)) and not prefetch_threads()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_passes_errors_on_in_their_turn(depth):
    def items():
        yield 1
        yield 2
        raise InputError("row 3 is damaged")

    taken = []
    with pytest.raises(InputError, match="row 3"):
        for number in prefetch(items(), depth):
            taken.append(number)
    assert taken == [1, 2] and not prefetch_threads()


def test_prefetch_stops_with_its_iterator():
    """Closing it, breaking out of the loop, or never starting it leaves no thread."""
    endless = prefetch(iter(int, 1), 2)
    next(endless)
    assert len(prefetch_threads()) == 1
    endless.close()
    assert not prefetch_threads()
    for _ in prefetch(iter(int, 1), 2):
        break
    del _
    assert not prefetch_threads()
    prefetch(iter(int, 1), 2)
    assert not prefetch_threads()


def test_a_damaged_row_stops_the_run_with_its_name(tmp_path):
    path = tmp_path / "x.mindrecord"
    with MindRecordWriter(path, {"input_ids": "int32"}) as writer:
        for number in range(8):
            writer.write({"input_ids": np.full(50, number, np.int32)})
    with open(path, "r+b") as file:
        file.seek((1 << 24) + 5 * (8 + 4 + 13 + 50))
        file.write(b"\xff")
    stream = BatchStream(open_mindrecord(path), batch_size=2, pad_id=PAD, shuffle=False)
    with pytest.raises(InputError, match="train_dataset row 5: .*x.mindrecord row 5: its index says"):
        list(stream.steps())
    assert not prefetch_threads()
