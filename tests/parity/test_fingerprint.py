"""Fingerprints: exact hash and norm, values spread over the whole tensor, the same for every memory layout."""

import hashlib

import numpy as np

from msft.parity.fingerprint import SAMPLES, fingerprint, norm


def test_statistics_are_those_of_hand():
    found = fingerprint(np.array([[3.0, -4.0], [0.0, 12.0]], np.float32))
    assert (found.norm, found.mean, found.largest, found.shape, found.size) == (13.0, 2.75, 12.0, (2, 2), 4)
    assert found.sample.tolist() == [3.0, -4.0, 0.0, 12.0]


def test_the_hash_is_that_of_the_bytes_in_c_order():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert fingerprint(array).sha256 == hashlib.sha256(array.tobytes()).hexdigest()
    assert fingerprint(np.asfortranarray(array)).sha256 == fingerprint(array).sha256


def test_samples_reach_from_the_first_to_the_last_value():
    found = fingerprint(np.arange(100_000, dtype=np.float32))
    assert len(found.sample) == SAMPLES and found.sample[0] == 0 and found.sample[-1] == 99_999
    gaps = np.diff(found.sample)
    assert gaps.min() >= 391 and gaps.max() <= 393


def test_norms_are_summed_in_float64():
    # In float32 adding 1 to 2^24 changes nothing.
    array = np.ones(2**25, np.float32)
    assert norm(array) == np.sqrt(2.0**25)
