"""Comparisons against hand-worked numbers: verdicts, distances in ulps, differences of tensors and fingerprints."""

import math

import numpy as np
import pytest

from msft.parity.compare import (
    Verdict,
    compare_checks,
    compare_facts,
    compare_numbers,
    difference,
    ulps,
    verdict_of,
)
from msft.parity.fingerprint import fingerprint
from msft.parity.observe import Observation


@pytest.mark.parametrize(
    "error,slack,verdict",
    [
        (0.0, 1, "BIT-EQUAL"),
        (1e-12, 1, "WITHIN fp32"),
        (1e-5, 1, "WITHIN fp32"),
        (1.1e-5, 1, "WITHIN bf16"),
        (1e-2, 1, "WITHIN bf16"),
        (1.1e-2, 1, "DIVERGES"),
        (math.inf, 1, "DIVERGES"),
        (math.nan, 1, "DIVERGES"),
        (9e-5, 10, "WITHIN fp32"),
        (9e-2, 10, "WITHIN bf16"),
    ],
)
def test_verdicts(error, slack, verdict):
    assert str(verdict_of(error, slack)) == verdict


def test_verdicts_order_from_best_to_worst():
    assert Verdict.BIT_EQUAL < Verdict.FP32 < Verdict.BF16 < Verdict.DIVERGES


@pytest.mark.parametrize(
    "a,b,distance",
    [
        (1.0, 1.0, 0),
        (0.0, -0.0, 0),
        (1.0, 1.0 + 2**-23, 1),
        (1.0, 1.0 - 2**-24, 1),
        (1.0, 2.0, 2**23),
        (-1.0, -2.0, 2**23),
        (2.0**-149, -(2.0**-149), 2),
        (1.0, math.inf, None),
        (1.0, math.nan, None),
        (1.0, 1e300, None),
    ],
)
def test_ulps(a, b, distance):
    assert ulps(a, b) == distance and ulps(b, a) == distance


def test_facts_differ_by_value_and_by_absence():
    rows = {row.name: row for row in compare_facts({"a": 1, "b": [1, 2]}, {"a": 1, "b": [1, 3], "c": 0})}
    assert [str(row.verdict) for row in rows.values()] == ["BIT-EQUAL", "DIVERGES", "DIVERGES"]
    assert rows["a"].details == {"both": 1}
    assert rows["b"].details == {"left": [1, 2], "right": [1, 3]}
    assert rows["c"].details == {"left": None, "right": 0}


def test_numbers_are_relative_to_the_larger_one():
    one, loose, absent = compare_numbers({"x": 1.0, "y": 1.00005, "z": 1.0}, {"x": 1.001, "y": 1.0}, slack={"y": 10.0})
    assert one.error == pytest.approx(0.001 / 1.001) and one.verdict is Verdict.BF16
    assert loose.verdict is Verdict.FP32
    assert absent.verdict is Verdict.DIVERGES


def test_checks_name_their_side():
    rows = compare_checks({"left": Observation(checks={"c": 1e-6}), "right": Observation(checks={"c": 0.5})})
    assert [(row.side, str(row.verdict)) for row in rows] == [("left", "BIT-EQUAL"), ("right", "DIVERGES")]


def test_the_difference_of_two_tensors_by_hand():
    found = difference(np.array([3.0, 4.5], np.float32), np.array([3.0, 4.0], np.float32))
    assert (found.equal, found.gap, found.right_norm, found.relative) == (False, 0.5, 5.0, 0.1)
    assert found.details == {"max_abs": 0.5, "mean_abs": 0.25, "share_within_1e-3": 0.5}
    assert found.cosine == pytest.approx((9 + 18) / (5 * math.sqrt(9 + 20.25)))


def test_zeros_are_equal_and_far_from_everything_else():
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert difference(zeros, zeros).equal and difference(zeros, zeros).relative == 0
    assert difference(ones, zeros).relative == math.inf
    # The sign of a zero is a bit like any other.
    assert not difference(-zeros, zeros).equal


def test_fingerprints_estimate_the_difference_of_the_whole():
    generator = np.random.default_rng(0)
    a = generator.standard_normal((400, 500)).astype(np.float32)
    b = a + 1e-3 * generator.standard_normal(a.shape).astype(np.float32)
    whole = difference(a, b)
    for left, right in ((fingerprint(a), b), (a, fingerprint(b)), (fingerprint(a), fingerprint(b))):
        found = difference(left, right)
        assert found.relative == pytest.approx(whole.relative, rel=0.2)
        assert found.cosine == pytest.approx(whole.cosine, abs=1e-6)
    assert difference(fingerprint(a), a.copy()).equal


def test_a_change_between_the_samples_is_seen():
    a = np.ones(100_000, np.float32)
    b = a.copy()
    b[1] = 500.0
    found = difference(fingerprint(a), fingerprint(b))
    assert not found.equal and found.relative > 0.1
