"""The same recipe, data and start must train alike: MindFormers' losses, rates and norms are ours, step by step."""

import json

import numpy as np
import pytest
from mindformers_logits import assert_same_on_real_tokens, transformers_logits

from msft.data.mindrecord import open_mindrecord

pytestmark = pytest.mark.mindformers

STEPS = 20


@pytest.fixture(scope="module")
def train_here(request, msft, tmp_path_factory):
    """Call `train_here(run, backend)` for the output folder of our training by a MindFormers run's recipe."""
    done = {}

    def train(run: str, backend: str):
        if (run, backend) not in done:
            theirs, out = request.getfixturevalue(run), tmp_path_factory.mktemp(f"{run}_{backend}") / "out"
            words = ("--backend", backend, "--load_checkpoint", theirs.start, "--output_dir", out)
            msft("train", theirs.recipe, *words)
            done[run, backend] = out
        return done[run, backend]

    return train


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
def test_our_training_repeats_its_steps(request, train_here, records, run, backend):
    theirs = request.getfixturevalue(run).steps
    log = (train_here(run, backend) / "trainer_log.jsonl").read_text().splitlines()
    ours = [json.loads(line) for line in log]
    assert len(theirs) == len(ours) == STEPS
    assert [step["supervised"] for step in ours] == supervised_there(records)
    losses = column(theirs, "loss")
    assert losses[-5:].mean() < losses[:5].mean() - 0.05, "MindFormers learnt nothing"
    np.testing.assert_allclose(column(ours, "loss"), losses, atol=1e-4)
    # MindFormers computes rates in float32.
    np.testing.assert_allclose(column(ours, "learning_rate"), column(theirs, "learning_rate"), rtol=1e-5, atol=1e-9)
    # Without clipping MindFormers tells no norm.
    if theirs[0]["grad_norm"] is not None:
        np.testing.assert_allclose(column(ours, "grad_norm"), column(theirs, "grad_norm"), rtol=1e-4)


@pytest.mark.parametrize("backend", ["mindspore", "torch"])
def test_our_trained_model_is_its_trained_model(train_here, full_logits, tiny, backend):
    ours = transformers_logits(train_here("full_run", backend) / "model", tiny.ids)
    assert_same_on_real_tokens(full_logits, ours, tiny, atol=1e-3)


@pytest.mark.parametrize("backend", ["mindspore", "torch"])
def test_our_trained_adapter_is_its_trained_adapter(train_here, lora_logits, tiny, backend):
    ours = transformers_logits(tiny.hf, tiny.ids, train_here("lora_run", backend) / "adapter")
    assert_same_on_real_tokens(lora_logits, ours, tiny, atol=1e-3)


def test_mindformers_runs_the_model_we_trained(train_here, full_run, their_logits, tiny, msft, tmp_path):
    model = train_here("full_run", "mindspore") / "model"
    msft("convert_weight", "--model", "llama", "--input_path", model, "--output_path", tmp_path / "ours.ckpt")
    theirs = their_logits(full_run.recipe, tmp_path / "ours.ckpt")
    assert_same_on_real_tokens(theirs, transformers_logits(model, tiny.ids), tiny)


def test_only_matrices_and_adapters_are_decayed_there(full_run, lora_run):
    names = {name for name, decay in full_run.weight_decay.items() if decay == 0}
    assert names == {name for name in full_run.weight_decay if "norm" in name}
    assert lora_run.weight_decay and all(decay > 0 for decay in lora_run.weight_decay.values())
