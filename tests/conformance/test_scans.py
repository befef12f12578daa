"""Protects the scans of state spaces: both engines compute the papers' recurrence and its gradients, in any strips."""

import numpy as np
import pytest

from msft.backend.segments import places
from tests.conformance import scans
from tests.conformance.tiny_engines import ENGINES

LENGTH = 150
# Examples that end in the middle of strips and chunks, one of a single token, one across a whole strip.
PIECES = np.array([[first, end, first, end] for first, end in ((0, 5), (5, 6), (6, 61), (61, 137))])


def close(found, expected, what=""):
    """Within a part in 10^5 of the largest, float32 against float64; what is below 10^-6 of all else is nothing."""
    assert np.isfinite(found).all(), what
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(np.abs(expected).max(), 1e-6), err_msg=what)


# MindSpore's products of matrices are in the default suite by a whole model.
MARKS = {("mindspore", "mamba2"): pytest.mark.families}
CASES = [pytest.param(engine, kind, marks=MARKS.get((engine, kind), ())) for engine in ENGINES for kind in scans.SPACES]


@pytest.mark.parametrize(("engine", "kind"), CASES)
def test_a_scan_is_the_recurrence(engine, kind):
    """Usual steps; steps that forget within a token (exp(-50) and less); steps that forget nothing in 150 tokens."""
    space, where = scans.SPACES[kind], places(PIECES, LENGTH)
    gradient = np.random.default_rng(1).normal(0, 1, (LENGTH, space.intermediate_size)).astype(np.float32)
    for steps in (-1.0, 60.0, -30.0):
        packed, tensors = scans.random_scan(space, LENGTH, steps=steps)
        expected, by_all = scans.plain_results(space, packed, tensors, where, gradient)
        outputs, found = scans.on_engine(engine, space, packed, tensors, where, gradient)
        close(outputs, expected, f"steps {steps}")
        for name, one, other in zip(("packed", *space.scanned), found, by_all, strict=True):
            close(one, other, f"{name}, steps {steps}")


def test_examples_begin_at_0_and_what_fills_up_stands_alone():
    assert places(np.array([[0, 3, 0, 3], [3, 5, 3, 5]]), 7).tolist() == [0, 1, 2, 0, 1, 0, 0]
