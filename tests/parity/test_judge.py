"""A stage's verdict: what comes first, what passes as rounding, what is judged together."""

import numpy as np

from msft.parity.compare import Verdict
from msft.parity.judge import ALL_PARAMETERS, judge
from msft.parity.observe import Observation, leads_of

ONES = np.ones((4, 8), np.float32)


def verdict(stage, left, right, bar=Verdict.FP32):
    return judge(stage, ("torch", left), ("mindspore", right), bar)


def test_the_first_beyond_the_bar_is_named_in_the_order_of_the_forward_pass():
    arrays = {f"model.layers.{number}": ONES * (1 + number) for number in range(4)}
    other = {name: array * (1 + 1e-3 * (number >= 2)) for number, (name, array) in enumerate(arrays.items())}
    result = verdict("forward", Observation(arrays=arrays), Observation(arrays=other))
    assert result.first.name == "model.layers.2" and result.verdict is Verdict.BF16 and not result.passed
    assert verdict("forward", Observation(arrays=arrays), Observation(arrays=other), Verdict.BF16).passed


def test_a_side_that_is_wrong_by_itself_comes_before_what_follows_from_it():
    left = Observation(checks={"rotary layout": 0.0}, numbers={"x": 1.0})
    right = Observation(checks={"rotary layout": 1.2}, numbers={"x": 2.0})
    result = verdict("weights", left, right)
    assert (result.first.name, result.first.side) == ("rotary layout", "mindspore")


def test_absent_tensors_and_other_shapes_diverge():
    result = verdict("weights", Observation(arrays={"a": ONES, "b": ONES}), Observation(arrays={"a": ONES.T}))
    assert [(row.name, row.verdict) for row in result.rows] == [("a", Verdict.DIVERGES), ("b", Verdict.DIVERGES)]
    assert result.rows[0].details == {"left": "shape (4, 8)", "right": "shape (8, 4)"}
    assert result.rows[1].details["right"] == "absent"


def test_a_gradient_of_nothing_but_noise_passes_and_a_wrong_one_does_not():
    noise = np.full((4, 8), 1e-7, np.float32)
    left, right = Observation(arrays={"w": ONES, "k.bias": noise}), Observation(arrays={"w": ONES, "k.bias": -noise})
    assert verdict("backward", left, right).passed
    right = Observation(arrays={"w": ONES, "k.bias": -50 * noise})
    assert verdict("backward", left, right).first.name == "k.bias"


def test_a_gradient_may_be_a_thousandth_off_and_no_more():
    right = Observation(arrays={"w": ONES})
    for factor, passes in ((1.0009, True), (1.0011, False)):
        assert verdict("backward", Observation(arrays={"w": ONES * np.float32(factor)}), right).passed == passes
    turned = ONES.copy()
    turned[0, 0], turned[0, 1] = 1.005, 0.995
    assert not verdict("backward", Observation(arrays={"w": turned}), right).passed


def test_parameters_are_judged_together():
    left = Observation(arrays={"a": ONES * 100, "b": ONES})
    right = Observation(arrays={"a": ONES * 100, "b": ONES * np.float32(1.005)})
    result = verdict("trajectory", left, right)
    # 0.005 of a hundredth of the norm: 5e-5, within ten times the bar.
    assert result.passed and result.rows[-1].name == ALL_PARAMETERS
    assert abs(result.rows[-1].error - 5e-5) < 1e-6


def test_first_and_second_moments_have_scales_of_their_own():
    small = ONES * np.float32(1e-8)
    left = Observation(arrays={"first moment of w": ONES, "second moment of w": small})
    right = Observation(arrays={"first moment of w": ONES, "second moment of w": small * 2})
    assert verdict("step", left, right).first.name == "second moment of w"


def test_answers_that_part_at_a_tie_pass_and_others_do_not():
    def seen(answer, leads):
        return Observation(facts={"answer 1": answer}, notes={leads_of("answer 1"): leads})

    tie = verdict("generation", seen([1, 2, 3], [0.5, 1e-6, 0.5]), seen([1, 4, 5], [0.5, 3e-6, 0.5]))
    assert tie.passed and tie.verdict is Verdict.FP32
    clear = verdict("generation", seen([1, 2, 3], [0.5, 0.1, 0.5]), seen([1, 4, 5], [0.5, 0.2, 0.5]))
    assert not clear.passed and clear.first.details["first difference at token"] == 2
    short = verdict("generation", seen([1, 2, 3], [0.5, 0.1, 0.5]), seen([1, 2], [0.5, 0.2]))
    assert not short.passed and short.first.details["lengths"] == [3, 2]
    absent = verdict("generation", seen([1, 2], [0.5, 0.1]), Observation())
    assert not absent.passed
    same = verdict("generation", seen([1, 2], [0.5, 0.1]), seen([1, 2], [0.5, 0.2]))
    assert same.verdict is Verdict.BIT_EQUAL
