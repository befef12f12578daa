"""Protects the numbers of routing that both engines share, worked out by hand."""

import numpy as np
import pytest

from msft.backend.routing import Balance, chosen


def test_the_largest_shares_are_chosen_and_of_equal_ones_the_first():
    shares = np.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25], [0.2, 0.3, 0.2, 0.3], [0.4, 0.2, 0.2, 0.2]])
    expected = [[0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0]]
    np.testing.assert_array_equal(chosen(shares.astype(np.float32), 2), np.array(expected, bool))
    assert chosen(shares, 4).all()


def test_the_balance_loss_by_hand():
    """Two layers of two tokens, one choice of three experts: 3, 1 and 0 choices in four rows.

    Shares sum up to 2, 1.2 and 0.8: 3 x (3/4 x 2/4 + 1/4 x 1.2/4) = 1.35.
    """
    balance = Balance(3)
    balance.add(np.array([2, 0, 0]), np.array([1.2, 0.5, 0.3]), 2)
    balance.add(np.array([1, 1, 0]), np.array([0.8, 0.7, 0.5]), 2)
    assert balance.close(2.0) == pytest.approx(1.35)
    # Of a token's share of an expert: 2 x 3 x choices / 4 rows / 4 rows.
    np.testing.assert_allclose(balance.slope, [6 * 3 / 16, 6 / 16, 0])
    balance.add(np.array([9, 9, 9]), np.array([9, 9, 9]), 9)
    assert balance.close(2.0) == pytest.approx(1.35)


def test_even_use_is_1_a_choice():
    balance = Balance(4)
    balance.add(np.full(4, 8), np.full(4, 4.0), 16)
    assert balance.close(1.0) == pytest.approx(2)
