"""A LLaMA-Factory file and a Firefly file train as they are, on both engines alike.

MindSpore compiles for seconds, so it runs one of them for four steps.
"""

import json

import numpy as np
import pytest

from msft.cli.estimate import main as estimate
from msft.cli.launch import main as launch
from msft.cli.train import main
from msft.data.mindrecord import open_mindrecord

pytest.importorskip("torch")
pytest.importorskip("mindspore")

LLAMA_FACTORY = """\
model_name_or_path: {model}
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: q_proj,v_proj
dataset: counting
template: default
cutoff_len: 16
output_dir: saves/sft
logging_steps: 1
save_strategy: 'no'
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
learning_rate: 1.0e-2
num_train_epochs: 1.0
lr_scheduler_type: cosine
warmup_ratio: 0.3
val_size: 5
eval_strategy: epoch
seed: 7
"""
ROWS = [("w3 w4", "w5 w6 w7"), ("w8 w9", "w10"), ("w20", "w21 w22")] * 10


@pytest.fixture
def checkout(tmp_path, tiny_model, monkeypatch):
    """A folder as a user of both toolkits has it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    info = {"counting": {"file_name": "counting.json", "columns": {"prompt": "q", "response": "a"}}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "data" / "counting.json").write_text(json.dumps([{"q": q, "a": a} for q, a in ROWS]))
    pairs = [{"conversation": [{"human": q, "assistant": a}]} for q, a in ROWS]
    (tmp_path / "data" / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "lora_sft.yaml").write_text(LLAMA_FACTORY.format(model=tiny_model))
    return tmp_path


def records(output):
    return [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]


def values(output, key):
    return [record[key] for record in records(output) if key in record]


def test_a_llama_factory_file_trains_alike_on_both_engines(checkout, capsys):
    for backend in ("torch", "mindspore"):
        words = ["--backend", backend, "--output_dir", backend, "--device", "cpu", "learning_rate=2e-2"]
        assert main(["lora_sft.yaml", *words]) == 0
    torch, mindspore = checkout / "torch", checkout / "mindspore"
    # 25 rows, 8 a step, the last of them filled up; the peak after ceil(0.3 x 4) = 2 steps, then half a cosine.
    assert values(torch, "learning_rate") == pytest.approx([0, 0.01, 0.02, 0.01])
    for key in ("loss", "eval_loss"):
        np.testing.assert_allclose(values(mindspore, key), values(torch, key), rtol=1e-5)
    assert len(values(torch, "loss")) == 4 and len(values(torch, "eval_loss")) == 1
    config = json.loads((torch / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8) and set(config["target_modules"]) == {"q_proj", "v_proj"}
    printed = capsys.readouterr()
    assert "lora_sft.yaml: read as a file of LLaMA-Factory" in printed.err
    assert "--template llama_factory:default" in printed.out
    # What the run wrote is a recipe by itself, and goes on from the rows that were made.
    assert main([str(torch / "recipe.yaml"), "--output_dir", "again", "--dry_run"]) == 0


def test_a_firefly_file_trains_and_the_other_commands_take_it(checkout, tiny_model, capsys):
    arguments = {
        "output_dir": "output/firefly",
        "model_name_or_path": str(tiny_model),
        "train_file": "./data/pairs.jsonl",
        "template_name": "qwen",
        "train_mode": "lora",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 15,
        "learning_rate": 2e-4,
        "max_seq_length": 32,
        "logging_steps": 1,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 1,
        "gradient_checkpointing": True,
        "optim": "paged_adamw_32bit",
        "max_grad_norm": 0.3,
        "remove_unused_columns": False,
    }
    (checkout / "qwen.json").write_text(json.dumps(arguments, indent="\t"))
    assert main(["qwen.json", "--device", "cpu"]) == 0
    output = checkout / "output" / "firefly"
    assert values(output, "learning_rate") == pytest.approx([0, 2e-4])
    data = open_mindrecord(output / "data" / "train_dataset.mindrecord")
    assert len(data) == len(ROWS) and len(data.row(0)["input_ids"]) == 32
    capsys.readouterr()
    # A second run finds the rows made; the estimate and the launcher read the file too.
    assert main(["qwen.json", "--device", "cpu", "--dry_run"]) == 0
    assert "is there already, made from the same data" in capsys.readouterr().out
    assert estimate(["qwen.json", "--device", "a100"]) == 0
    assert launch(["qwen.json", "--nproc_per_node", "2", "--dry-run"]) == 0
    assert "--config qwen.json" in capsys.readouterr().out


def test_what_is_wrong_with_a_file_ends_it_before_a_framework_is_imported(checkout, capsys):
    assert main(["lora_sft.yaml", "stage=dpo", "--lora_rnk", "3"]) == 2
    err = capsys.readouterr().err
    assert "stage: 'dpo' is not supported: stages sft and pt are built, with finetuning_type lora or full" in err
    assert "--lora_rnk: unknown flag, did you mean '--lora_rank'?" in err
    assert not (checkout / "saves").exists()
