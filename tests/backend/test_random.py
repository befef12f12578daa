"""Protects: random numbers are pure functions of names and counters, with the right statistics."""

import math

import numpy as np

from msft.backend import random


def token_keys(seed, step, examples, length):
    """The keys of one example a row, as `Batch` numbers it."""
    shape = (len(examples), length)
    rows, positions = np.broadcast_to(np.array(examples)[:, None], shape), np.broadcast_to(np.arange(length), shape)
    return random.token_keys(seed, step, rows.astype(np.int32), positions.astype(np.int32))


def test_the_keys_are_fixed_for_ever():
    """Pinned numbers, from when a row was one example: a run that resumes after an upgrade drops the same features."""
    assert token_keys(42, 7, (0, 5), 3).tolist() == [
        [-1643472787, -1674374895, 64270028],
        [1687974319, 67448834, -1353216222],
    ]


def test_a_packed_example_has_the_keys_it_has_alone():
    """Examples 4 and 5 of the step, 3 and 2 tokens long, in one row of 6."""
    alone = token_keys(1, 2, (4, 5), 3)
    packed = random.token_keys(1, 2, np.array([[4, 4, 4, 5, 5, 0]]), np.array([[0, 1, 2, 0, 1, 5]]))
    assert packed[0, :5].tolist() == [*alone[0], *alone[1, :2]]


def test_a_mask_keeps_the_asked_share_and_differs_between_steps_modules_and_rows():
    rows, length, features = 8, 64, 512
    module = random.feature_keys("model.layers.0.self_attn.q_proj", features)
    keys = token_keys(seed=1, step=0, examples=range(rows), length=length)
    keep = random.keep_mask(keys, module, 0.1)
    deviation = math.sqrt(0.1 * 0.9 / keep.size)
    assert abs(keep.mean() - 0.9) < 5 * deviation
    assert np.abs(keep.mean(axis=(0, 1)) - 0.9).max() < 6 * math.sqrt(0.09 / (rows * length))
    others = [
        random.keep_mask(token_keys(1, 1, range(rows), length), module, 0.1),
        random.keep_mask(token_keys(2, 0, range(rows), length), module, 0.1),
        random.keep_mask(keys, random.feature_keys("model.layers.1.self_attn.q_proj", features), 0.1),
        random.keep_mask(token_keys(1, 0, range(rows, 2 * rows), length), module, 0.1),
    ]
    for other in others:
        # Independent masks agree where both keep or both drop: 0.9^2 + 0.1^2.
        assert abs((keep == other).mean() - 0.82) < 0.01


def test_a_row_has_the_same_mask_whatever_batch_it_stands_in():
    whole = token_keys(3, 5, range(8), 16)
    part = token_keys(3, 5, (6, 2), 16)
    longer = token_keys(3, 5, (6,), 32)
    np.testing.assert_array_equal(part, whole[[6, 2]])
    np.testing.assert_array_equal(longer[:, :16], whole[[6]])


def test_dropping_nothing_or_almost_everything():
    keys, features = token_keys(0, 0, range(4), 64), random.feature_keys("m", 64)
    assert random.keep_mask(keys, features, 0.0).all()
    assert random.keep_mask(keys, features, 0.999).mean() < 0.01


def test_lora_a_is_kaiming_uniform_and_named():
    drawn = random.lora_a(7, "model.layers.0.self_attn.q_proj", 16, 576)
    bound = 1 / math.sqrt(576)
    assert drawn.shape == (16, 576) and drawn.dtype == np.float32
    assert np.abs(drawn).max() <= bound and abs(drawn.std() - bound / math.sqrt(3)) < 0.02 * bound
    np.testing.assert_array_equal(drawn, random.lora_a(7, "model.layers.0.self_attn.q_proj", 16, 576))
    assert not np.array_equal(drawn, random.lora_a(8, "model.layers.0.self_attn.q_proj", 16, 576))
