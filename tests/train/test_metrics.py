"""What a run measures and draws: log lines, TensorBoard events as TensorBoard reads them, the PNG."""

import json
import math
import struct
from dataclasses import replace

import pytest

from msft.train import plot, tensorboard
from msft.train.metrics import EvalRecord, StepRecord, TrainerLog, perplexity, read_log

RECORD = StepRecord(1, 0.1, 2.5, 1e-4, 0.7, 100, 60, 50.0, 2.0, 1.0, False)
FIELDS = (
    "step epoch loss learning_rate grad_norm tokens supervised tokens_per_second seconds loss_scale skipped"
).split()


def test_each_line_is_there_at_once_with_all_fields(tmp_path):
    path = tmp_path / "trainer_log.jsonl"
    log = TrainerLog(path, 0)
    log.write(RECORD)
    # Read before the log is closed: a crash must not lose the line.
    assert list(json.loads(path.read_text())) == FIELDS
    log.write(EvalRecord(1, 0.1, 2.0, math.exp(2), 60, 1.5))
    assert read_log(path)[1]["eval_loss"] == 2.0
    log.close()


def test_infinite_numbers_stay_json(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrainerLog(path, 0)
    log.write(replace(RECORD, grad_norm=math.inf, skipped=True))
    log.close()
    value = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert value["grad_norm"] is None and value["skipped"] is True


def test_resuming_drops_later_lines_and_one_cut_off_by_a_crash(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrainerLog(path, 0)
    for step in range(1, 6):
        log.write(replace(RECORD, step=step))
    log.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')
    log = TrainerLog(path, 3)
    log.write(replace(RECORD, step=4, loss=9.0))
    log.close()
    assert [(record["step"], record["loss"]) for record in read_log(path)] == [(1, 2.5), (2, 2.5), (3, 2.5), (4, 9.0)]


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e6) == math.inf


def test_smoothing_by_hand():
    # Weights 0.9 and 1, divided by their sum 1.9.
    assert plot.smooth([4.0, 2.0]) == pytest.approx([4.0, (0.9 * 4 + 2) / 1.9])
    assert plot.smooth([3.0] * 20) == pytest.approx([3.0] * 20)


def test_the_curve_is_a_png_with_ink(tmp_path):
    image = pytest.importorskip("PIL.Image")
    records = [{"step": step, "loss": 3 / step} for step in range(1, 30)] + [{"step": 29, "eval_loss": 0.5}]
    plot.save_loss_curve(records, tmp_path / "training_loss.png")
    content = (tmp_path / "training_loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 600 and height > 400
    colours = {colour for _, colour in image.open(tmp_path / "training_loss.png").convert("RGB").getcolors(1 << 20)}
    assert (31, 119, 180) in colours and (255, 127, 14) in colours  # the smoothed curve and the evaluation point


def test_events_as_tensorboard_reads_them(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    writer = tensorboard.EventWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(replace(RECORD, step=step, loss=float(step)))
    writer.write(EvalRecord(3, 0.3, 2.0, math.exp(2), 60, 1.5))
    writer.close()
    events = accumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert events.Scalars("eval/perplexity")[0].value == pytest.approx(math.exp(2))
    assert "train/learning_rate" in events.Tags()["scalars"]


def test_a_resumed_run_hides_the_steps_it_takes_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    for start, losses in ((0, [1.0, 2.0, 3.0]), (1, [20.0, 30.0])):
        writer = tensorboard.EventWriter(tmp_path, start)
        for step, loss in enumerate(losses, start + 1):
            writer.write(replace(RECORD, step=step, loss=loss))
        writer.close()
    events = accumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 20.0), (3, 30.0)]
