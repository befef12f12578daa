"""Protects: random numbers are pure functions of names and counters, with the right statistics."""

import math

import numpy as np

from msft.backend import random


def test_a_mask_keeps_the_asked_share_and_differs_between_steps_modules_and_rows():
    rows, length, features = 8, 64, 512
    module = random.feature_keys("model.layers.0.self_attn.q_proj", features)
    keys = random.token_keys(seed=1, step=0, row_ids=np.arange(rows), length=length)
    keep = random.keep_mask(keys, module, 0.1)
    deviation = math.sqrt(0.1 * 0.9 / keep.size)
    assert abs(keep.mean() - 0.9) < 5 * deviation
    assert np.abs(keep.mean(axis=(0, 1)) - 0.9).max() < 6 * math.sqrt(0.09 / (rows * length))
    others = [
        random.keep_mask(random.token_keys(1, 1, np.arange(rows), length), module, 0.1),
        random.keep_mask(random.token_keys(2, 0, np.arange(rows), length), module, 0.1),
        random.keep_mask(keys, random.feature_keys("model.layers.1.self_attn.q_proj", features), 0.1),
        random.keep_mask(random.token_keys(1, 0, np.arange(rows) + rows, length), module, 0.1),
    ]
    for other in others:
        # Independent masks agree where both keep or both drop: 0.9^2 + 0.1^2.
        assert abs((keep == other).mean() - 0.82) < 0.01


def test_a_row_has_the_same_mask_whatever_batch_it_stands_in():
    whole = random.token_keys(3, 5, np.arange(8), 16)
    part = random.token_keys(3, 5, np.array([6, 2]), 16)
    longer = random.token_keys(3, 5, np.array([6]), 32)
    np.testing.assert_array_equal(part, whole[[6, 2]])
    np.testing.assert_array_equal(longer[:, :16], whole[[6]])


def test_dropping_nothing_or_almost_everything():
    keys, features = random.token_keys(0, 0, np.arange(4), 64), random.feature_keys("m", 64)
    assert random.keep_mask(keys, features, 0.0).all()
    assert random.keep_mask(keys, features, 0.999).mean() < 0.01


def test_lora_a_is_kaiming_uniform_and_named():
    drawn = random.lora_a(7, "model.layers.0.self_attn.q_proj", 16, 576)
    bound = 1 / math.sqrt(576)
    assert drawn.shape == (16, 576) and drawn.dtype == np.float32
    assert np.abs(drawn).max() <= bound and abs(drawn.std() - bound / math.sqrt(3)) < 0.02 * bound
    np.testing.assert_array_equal(drawn, random.lora_a(7, "model.layers.0.self_attn.q_proj", 16, 576))
    assert not np.array_equal(drawn, random.lora_a(8, "model.layers.0.self_attn.q_proj", 16, 576))
