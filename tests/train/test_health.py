"""Spikes of the loss by hand, and what the console, the log and the summary say of them and of skipped steps."""

import json
import math

import pytest

from msft.backend.contract import StepResult
from msft.train import health
from msft.train.health import Spikes
from msft.train.metrics import StepRecord
from msft.train.reporter import Reporter

# Median 2.0; distances from it 0 (four times) and 0.1 (six times), their median 0.1: a spike is above 2.0 + 6 * 0.1.
NOISY = [2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0]


def result_of(losses, last):
    spikes = Spikes()
    assert [spikes.add(loss, False) for loss in losses] == [None] * len(losses)
    return spikes.add(last, False)


@pytest.mark.parametrize(
    "losses, last, usual",
    [
        (NOISY, 2.59, None),
        (NOISY, 2.61, 2.0),
        # All equal: a spike is above 2.0 + 2.0 / 5.
        ([2.0] * 10, 2.39, None),
        ([2.0] * 10, 2.41, 2.0),
        # Nine are too few to know what is usual, and a loss that falls is no spike.
        (NOISY[:9], 99.0, None),
        (NOISY, 0.1, None),
    ],
)
def test_by_hand(losses, last, usual):
    assert result_of(losses, last) == usual


def test_only_the_recent_losses_count():
    # Fifty losses of 1 push those of 9 out of the window, so that 9 stands out again.
    spikes = Spikes()
    for loss in [9.0] * 20 + [1.0] * 50:
        spikes.add(loss, False)
    assert spikes.add(9.0, False) == 1.0


def test_losses_that_are_none_or_of_skipped_steps_are_no_spikes():
    spikes = Spikes()
    for loss in NOISY:
        spikes.add(loss, False)
    assert spikes.add(None, False) is spikes.add(math.nan, False) is spikes.add(50.0, True) is None


@pytest.mark.parametrize(
    "loss, skipped, scale, dynamic, bad",
    [
        (1.0, False, 1.0, False, False),
        (math.nan, True, 1.0, False, True),
        (math.inf, True, 1024.0, True, True),
        (1.0, True, 1024.0, True, False),
        (1.0, True, 1.0, True, True),
        (1.0, True, 1024.0, False, True),
    ],
)
def test_bad_steps(loss, skipped, scale, dynamic, bad):
    assert health.is_bad(StepResult(loss, 8, 1.0, skipped, scale), dynamic) is bad


def record(step, loss, skipped=False):
    norm = math.inf if skipped else 1.0
    return StepRecord(step, step / 4, loss, 1e-3, norm, 64, 48, 128.0, 0.5, 1.0, skipped)


def test_the_console_tells_of_spikes_and_skipped_steps_with_their_rows(tmp_path, capsys):
    with Reporter(tmp_path, 0, 13, 100, lambda step: [step, 7]) as reporter:
        for step, loss in enumerate([*NOISY, 5.0], 1):
            reporter.step(record(step, loss))
        reporter.step(record(12, math.nan, skipped=True))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: step 11: the loss jumped to 5.0000, usual were 2.0000; rows 10, 7 of train_dataset",
        "warning: step 12: skipped, loss nan, gradient norm inf at loss scale 1; rows 11, 7 of train_dataset",
    ]
    log = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    assert health.spikes(log) == [11] and log[11]["skipped"]
    # A resumed run remembers what was usual.
    with Reporter(tmp_path, 10, 13, 100, lambda step: [step]) as reporter:
        reporter.step(record(11, 2.61))
    assert "step 11: the loss jumped to 2.6100" in capsys.readouterr().err


def test_of_many_rows_the_first_are_named():
    assert health.shown_rows(range(66)).endswith("62, 63 and 2 more of train_dataset")
