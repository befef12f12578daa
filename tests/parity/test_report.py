"""The words of a report: the table, the trajectory's errors, strict JSON."""

import json
import math

import pytest

from msft.parity import report
from msft.parity.compare import Verdict
from msft.parity.judge import judge
from msft.parity.observe import Observation


def trajectory(left, right):
    sides = []
    for losses in (left, right):
        numbers = {}
        for step, loss in enumerate(losses, start=1):
            numbers |= {f"loss of step {step}": loss, f"learning rate of step {step}": 0.1}
            numbers[f"gradient norm of step {step}"] = 2.0
        sides.append(Observation(numbers=numbers))
    return judge("trajectory", ("torch", sides[0]), ("mindspore", sides[1]), Verdict.FP32)


def test_errors_of_the_trajectory_by_hand():
    summary = report.trajectory_summary(trajectory([4.0, 2.0, 1.0], [4.0, 2.0, 0.98]))
    assert summary["loss"]["mean"] == pytest.approx(0.02 / 3)
    assert summary["loss"]["max"] == pytest.approx(0.02)
    assert summary["loss"]["first_step_past_1_percent"] == 3
    assert summary["gradient norm"] == {"mean": 0.0, "max": 0.0, "first_step_past_1_percent": None}


def test_a_loss_that_is_not_a_number_counts_as_parted():
    summary = report.trajectory_summary(trajectory([4.0, math.nan], [4.0, 2.0]))
    assert summary["loss"]["first_step_past_1_percent"] == 2


def test_the_table_names_the_failure_and_what_was_not_run():
    passed = judge("recipe", ("torch", Observation({"seed": 1})), ("mindspore", Observation({"seed": 1})), Verdict.FP32)
    lines = report.table([passed, trajectory([4.0, 2.0], [4.0, 2.1])], ["torch", "mindspore"])
    assert lines[0] == "torch against mindspore"
    assert lines[2].split() == ["recipe", "BIT-EQUAL", "0", "1", "values"]
    assert lines[3].split()[:2] == ["trajectory", "DIVERGES"] and "loss of step 2" in lines[3]
    assert "FAILED" in lines[4]
    assert lines[-1].startswith("not run: data, weights, forward, loss, backward, step, generation")


def test_the_results_are_strict_json(tmp_path):
    left, right = Observation(facts={"seed": 1}), Observation(facts={"seed": 2})
    result = judge("recipe", ("torch", left), ("mindspore", right), Verdict.FP32)
    results = [result, trajectory([4.0, math.nan], [4.0, 2.0])]
    report.write(tmp_path, results, 3, ["torch", "mindspore"], perturb=False)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    value = json.loads((tmp_path / "parity.json").read_text(), parse_constant=refuse)
    assert value["stages"]["trajectory"]["first_difference"] == "loss of step 2"
    assert value["passed"] is False and value["stages"]["recipe"]["first_difference"] == "seed"


def test_a_check_that_an_error_ended_proves_nothing(tmp_path, capsys):
    same = Observation(facts={"seed": 1})
    result = judge("recipe", ("torch", same), ("mindspore", same), Verdict.FP32)
    report.write(tmp_path, [result], 3, ["torch", "mindspore"], perturb=False)
    said = capsys.readouterr().out
    assert "not finished, 1 of 9 stages ran" in said and "same run" not in said
    assert json.loads((tmp_path / "parity.json").read_text())["passed"] is False
