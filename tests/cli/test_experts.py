"""Protects training of models with experts through the command line: the balance loss, and two processes as one."""

import json

import pytest

from msft.cli.main import main
from tests.cli.test_families import model_of, run
from tests.conformance.test_two_workers import records, two_workers
from tests.conftest import recipe_writer


@pytest.fixture
def write(tmp_path, tiny_data):
    return recipe_writer(tmp_path, model_of("qwen2_moe", tmp_path / "model"), tiny_data)


@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_the_log_has_the_balance_loss_where_it_is_asked_for(coefficient, write, tmp_path, tiny_data, capsys):
    """In a column of its own and in the loss; an evaluation has none of it."""
    evaluation = {"data_loader": {"dataset_dir": str(tiny_data[1])}}
    asked = {"model__moe_aux_loss_coef": coefficient, "eval_dataset": evaluation, "do_eval": True}
    settings = {"model__pet_config": None, "optimizer": {"type": "AdamW", "learning_rate": 0.0}}
    assert main(["train", str(write(runner_config={"epochs": 1, "batch_size": 8}, **settings, **asked))]) == 0
    said = "".join(capsys.readouterr())
    log = [json.loads(line) for line in (tmp_path / "output" / "trainer_log.jsonl").read_text().splitlines()]
    steps, last = log[:-1], log[-1]
    if coefficient is None:
        assert not any("balance" in step for step in steps) and "| balance" not in said
        return
    assert all(step["balance"] > 1 for step in steps) and f"balance {steps[0]['balance']:.4f}" in said
    entropy = sum(step["loss"] - coefficient * step["balance"] for step in steps) / len(steps)
    assert last["eval_loss"] == pytest.approx(entropy, abs=0.1)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama",
            {"model__moe_aux_loss_coef": 0.01},
            "model.moe_aux_loss_coef: a llama model has no experts whose use could be balanced; leave it out",
        ),
        ("qwen2_moe", {"moe_config": {"expert_num": 4}}, "moe_config: {'expert_num': 4} is not supported: experts are"),
        (
            "qwen2_moe",
            {"model__pet_config__target_modules": ["q_proj", "experts"]},
            "target_modules: 'experts' matches no module (there are q_proj, k_proj, v_proj, o_proj, gate_proj, ",
        ),
        (
            "qwen2_moe",
            {"use_parallel": True, "parallel_config": {"context_parallel": 2}},
            "context_parallel: 2: the layers of qwen2_moe are not dealt to several processes yet",
        ),
    ],
)
def test_what_experts_do_not_go_with_is_refused(name, changes, message, tmp_path, tiny_data, capsys):
    write = recipe_writer(tmp_path, model_of(name, tmp_path / "model"), tiny_data)
    assert main(["train", str(write(**changes))]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.families
@pytest.mark.parametrize(("backend", "strategy"), [("torch", "fsdp"), ("torch", "ddp"), ("mindspore", "ddp")])
def test_two_processes_train_as_one_does(backend, strategy, write, tmp_path):
    """Experts, router and balance loss tuned over two processes; an expert need not have tokens on both.

    Micro-batches are those of one process with twice as many: a balance loss is a micro-batch's own.
    """
    recipe = write(
        backend,
        model__pet_config=None,
        model__moe_aux_loss_coef=0.3,
        strategy=strategy,
        optimizer={"type": "AdamW", "learning_rate": 0.002, "weight_decay": 0.1},
        runner_config={"epochs": 1, "stop_step": 4},
    )
    changed = "--runner_config.gradient_accumulation_steps"
    done = two_workers(f"run_finetune.py --config {recipe} --batch_size 2 {changed} 1 --output_dir two", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run("train", str(recipe), "--batch_size", "2", changed, "2", "--output_dir", "one", cwd=tmp_path)
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(one) == len(two) == 4
    for left, right in zip(one, two, strict=True):
        for key in ("loss", "balance", "grad_norm"):
            assert right[key] == pytest.approx(left[key], abs=2e-5), (key, left, right)
