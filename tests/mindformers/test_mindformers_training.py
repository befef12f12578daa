"""The same recipe, data and start must train alike: MindFormers' losses, rates and norms are ours, step by step."""

import json

import numpy as np
import pytest

from msft.data.mindrecord import open_mindrecord

pytestmark = pytest.mark.mindformers

STEPS = 20


def read_log(folder):
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def supervised_there(records):
    """Count the tokens in each step's loss by MindFormers' rule: a label counts if its input token is no padding."""
    source = open_mindrecord(records)
    rows = [source.row(number) for number in range(len(source))]
    counts = [int(((row["input_ids"][:-1] != 0) & (row["labels"][1:] != -100)).sum()) for row in rows]
    return [counts[i] + counts[i + 1] for i in range(0, len(counts), 2)] * (2 * STEPS // len(rows))


def column(steps, name):
    return np.array([step[name] for step in steps])


@pytest.mark.parametrize("backend", ["mindspore", "torch"])
@pytest.mark.parametrize("run", ["full_run", "lora_run", "adamw_run"])
def test_our_training_repeats_its_steps(request, msft, records, tmp_path, run, backend):
    theirs = request.getfixturevalue(run)
    words = ("--backend", backend, "--load_checkpoint", theirs.start, "--output_dir", tmp_path / "out")
    msft("train", theirs.recipe, *words)
    ours = [step for step in read_log(tmp_path / "out") if "loss" in step]
    assert len(theirs.steps) == len(ours) == STEPS
    assert [step["supervised"] for step in ours] == supervised_there(records)
    losses = column(theirs.steps, "loss")
    assert losses[-5:].mean() < losses[:5].mean() - 0.05, "MindFormers learnt nothing"
    np.testing.assert_allclose(column(ours, "loss"), losses, atol=1e-4)
    # MindFormers computes rates in float32.
    rates = column(theirs.steps, "learning_rate")
    np.testing.assert_allclose(column(ours, "learning_rate"), rates, rtol=1e-5, atol=1e-9)
    if theirs.steps[0]["grad_norm"] is not None:
        np.testing.assert_allclose(column(ours, "grad_norm"), column(theirs.steps, "grad_norm"), rtol=1e-4)
