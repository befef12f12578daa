"""Protects: how the loss scale falls, grows and stays, by hand-worked numbers."""

from msft.backend.contract import LossScale
from msft.backend.loss_scaler import LossScaler


def scales(settings, overflows):
    scaler = LossScaler(settings)
    found = []
    for overflow in overflows:
        scaler.update(overflow)
        found.append(scaler.value)
    return found


def test_a_scale_without_window_is_constant():
    assert scales(LossScale(8.0), [True, False, True]) == [8, 8, 8]


def test_it_falls_at_once_and_grows_after_a_window_of_good_steps_in_a_row():
    assert scales(LossScale(8.0, 2.0, 2), [True, False, True, False, False, False, False]) == [4, 4, 2, 2, 4, 4, 8]


def test_it_has_a_floor_and_growing_ends_at_the_top_without_falling():
    assert scales(LossScale(2.0**-13, 2.0, 1), [True, True, True])[-1] == 2.0**-14
    assert scales(LossScale(2.0**23, 2.0, 1), [False, False, False]) == [2.0**24] * 3
    assert scales(LossScale(2.0**30, 2.0, 1), [False, False]) == [2.0**30] * 2
