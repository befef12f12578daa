"""The learning rate at every step: hand-worked values, MindFormers' documented values, transformers' schedulers."""

import math

import pytest

from msft.train import schedules


def cosine(peak, total, warmup, **settings):
    return schedules.with_warmup(schedules.cosine(peak, total, warmup, **settings), peak, warmup)


def linear(peak, total, warmup):
    return schedules.with_warmup(schedules.linear(peak, total, warmup), peak, warmup)


def test_cosine_by_hand():
    rate = cosine(1.0, 10, 2, end=0.2)
    # Warm-up 0, 1/2; then 0.2 + 0.8 * (1 + cos(pi k / 8)) / 2 for k = 0 .. 7; then the end value.
    half = math.sqrt(0.5)
    assert [rate(step) for step in (0, 1, 2)] == pytest.approx([0.0, 0.5, 1.0])
    assert rate(4) == pytest.approx(0.2 + 0.4 * (1 + half))
    assert rate(6) == pytest.approx(0.6)
    assert rate(8) == pytest.approx(0.2 + 0.4 * (1 - half))
    assert [rate(step) for step in (10, 11, 1000)] == [0.2, 0.2, 0.2]


def test_cosine_cycles_by_hand():
    rate = cosine(1.0, 8, 0, num_cycles=1.0)
    assert [rate(step) for step in (0, 2, 4, 6)] == pytest.approx([1.0, 0.5, 0.0, 0.5])
    assert rate(8) == 0.0


def test_linear_and_constant_by_hand():
    rate = linear(4.0, 6, 2)
    assert [rate(step) for step in range(8)] == pytest.approx([0, 2, 4, 3, 2, 1, 0, 0])
    rate = schedules.with_warmup(schedules.constant(3.0), 3.0, 4, start=1.0)
    assert [rate(step) for step in range(6)] == pytest.approx([1, 1.5, 2, 2.5, 3, 3])


def test_values_mindformers_documents():
    # The examples in the docstrings of mindformers 1.3.2's lr_schedule.py: total 20, warm-up 10, rate 0.005.
    assert cosine(0.005, 20, 10)(1) == pytest.approx(0.0005)
    assert cosine(0.005, 20, 10)(15) == pytest.approx(0.0024999997, rel=1e-6)
    assert linear(0.005, 20, 10)(1) == pytest.approx(0.0005)
    assert linear(0.005, 20, 10)(15) == pytest.approx(0.0025)
    assert schedules.with_warmup(schedules.constant(0.005), 0.005, 10)(1) == pytest.approx(0.0005)


def test_warmup_length():
    assert schedules.warmup_length(100, 0.03, None) == 3
    assert schedules.warmup_length(99, 0.03, 7) == 2  # rounded down; a ratio wins over a count
    assert schedules.warmup_length(99, None, 7) == 7
    assert schedules.warmup_length(99, None, None) == 0


@pytest.mark.parametrize("total, warmup", [(40, 0), (40, 7), (5, 5), (1, 0)])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup"])
def test_equal_to_transformers(kind, total, warmup):
    torch = pytest.importorskip("torch")
    get_scheduler = pytest.importorskip("transformers").get_scheduler
    ours = {
        "cosine": schedules.cosine(0.3, total, warmup),
        "linear": schedules.linear(0.3, total, warmup),
        "constant_with_warmup": schedules.constant(0.3),
    }[kind]
    ours = schedules.with_warmup(ours, 0.3, warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert ours(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()
