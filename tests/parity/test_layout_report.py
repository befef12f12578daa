"""Protects what verify_layout tells of each kind of number: the worst of its steps."""

import math

from msft.parity import layout
from msft.parity.compare import Verdict, compare_facts, compare_numbers


def test_a_loss_that_is_no_number_is_the_worst(tmp_path, capsys):
    facts = {"supervised tokens of step 1": 3}
    numbers = {"loss of step 1": 1.0, "loss of step 2": math.nan, "gradient norm of step 1": 2.0}
    rows = compare_facts(facts, facts) + compare_numbers(numbers, numbers, {})
    assert not layout._tell(layout.Job("r.yaml", (), 2, 2, tmp_path), rows, Verdict.FP32, "title")
    loss, norm = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("loss", "gradient norm")))
    assert "DIVERGES" in loss and "nan (loss of step 2)" in loss
    assert "BIT-EQUAL" in norm
