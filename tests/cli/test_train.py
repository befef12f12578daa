"""`msft train` through the command line, on torch: what a run writes, modes, errors and exit codes."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from msft.cli.main import main as msft
from msft.cli.train import main
from tests.cli.runs import SAVING, losses, records
from tests.conftest import counting_rows

pytest.importorskip("torch")


ROOT = Path(__file__).parents[2]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


def test_lora_run_leaves_everything(write_recipe, output, tiny_model, capsys):
    assert main([str(write_recipe(callbacks=[SAVING]))]) == 0
    captured = capsys.readouterr()
    steps = [record for record in records(output) if "loss" in record]
    assert len(steps) == 24
    assert (
        list(steps[0])
        == (
            "step epoch loss learning_rate grad_norm tokens supervised tokens_per_second seconds loss_scale skipped"
        ).split()
    )
    assert np.mean(losses(output)[-4:]) < 0.9 * np.mean(losses(output)[:4])
    # 48 rows: every token is seen once an epoch; the last token of a row is only predicted.
    assert sum(step["tokens"] for step in steps[:12]) == sum(
        int((row["input_ids"] != 0).sum()) - 1 for row in counting_rows(48, seed=1)
    )
    assert (output / "training_loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((output / "tensorboard").glob("events.out.tfevents.*"))
    assert yaml.safe_load((output / "recipe.yaml").read_text())["runner_config"]["epochs"] == 2
    versions = json.loads((output / "versions.json").read_text())
    assert versions["packages"]["torch"] and versions["device"] == "cpu" and len(versions["data_sha256"]) == 1
    summary = json.loads((output / "train_summary.json").read_text())
    assert summary["steps"] == 24 and summary["tokens"] == sum(step["tokens"] for step in steps)
    assert summary["tuned_parameters"] == sum(4 * sum(shape) for shape in ((32, 32), (16, 32), (16, 32), (32, 32))) * 2
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-20", "step-24"]
    next_line = captured.out.strip().splitlines()[-1]
    words = shlex.split(next_line.removeprefix("next: "))
    assert words[:2] == ["msft", "generate"]
    assert words[words.index("--model") + 1] == str(tiny_model)
    assert words[words.index("--adapter") + 1] == str(output / "adapter")
    # The command works as it stands.
    words[words.index("--prompt") + 1] = "w9 w12 w15"
    assert msft([*words[1:], "--max_new_tokens", "4"]) == 0
    assert "w" in capsys.readouterr().out


def test_the_adapter_is_what_peft_trains_on_from(write_recipe, output, tiny_model, tiny_data):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    assert main([str(write_recipe()), "--do_eval", "True", "--eval_dataset_dir", str(tiny_data[1])]) == 0
    ours = [record for record in records(output) if "eval_loss" in record][-1]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, output / "adapter").eval()
    total, count = 0.0, 0
    for row in counting_rows(10, seed=2):
        size = int((row["input_ids"] != 0).sum())
        ids, labels = (torch.tensor(row[name][:size], dtype=torch.long)[None] for name in ("input_ids", "labels"))
        supervised = int((labels[0, 1:] != -100).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * supervised
        count += supervised
    assert ours["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert ours["eval_supervised"] == count


def test_full_run_writes_a_model_that_evaluates_alike(write_recipe, output, tiny_data, capsys):
    recipe = write_recipe(model__pet_config=None, optimizer__learning_rate=0.003)
    words = ["--do_eval", "True", "--eval_dataset_dir", str(tiny_data[1]), "--epochs", "1"]
    assert main(["--config", str(recipe), *words]) == 0
    assert losses(output)[-1] < 0.8 * losses(output)[0]
    model = output / "model"
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in model.iterdir()
    }
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith(f"next: msft generate --model {model} ")
    trained = records(output)[-1]["eval_loss"]
    evaluation = output.parent / "evaluation"
    words = ["--run_mode", "eval", "--load_checkpoint", str(model), "--output_dir", str(evaluation), *words[2:4]]
    assert main([str(recipe), *words]) == 0
    assert json.loads((evaluation / "eval_summary.json").read_text())["loss"] == pytest.approx(trained, rel=1e-6)


def test_what_is_not_installed_is_said(write_recipe, output, monkeypatch, capsys):
    from msft.train import plot, tensorboard

    for module in (plot, tensorboard):
        monkeypatch.setattr(module, "installed", lambda: False)
    assert main([str(write_recipe()), "--runner_config.stop_step", "1"]) == 0
    error = capsys.readouterr().err
    assert "not written: training_loss.png and TensorBoard events (pip install matplotlib tensorboard)" in error
    assert not (output / "training_loss.png").exists() and not (output / "tensorboard").exists()


def test_a_missing_framework_is_named_with_the_command(write_recipe, monkeypatch, capsys):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    assert main([str(write_recipe())]) == 2
    error = capsys.readouterr().err
    assert "backend torch needs peft, not installed here: pip install 'msft[torch]'" in error


def test_training_from_random_weights(write_recipe, output, capsys):
    sizes = {
        "type": "LlamaConfig",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 128,
        "multiple_of": 16,
        "seq_length": 24,
        "compute_dtype": "float32",
        "param_init_type": "float32",
        "rotary_dtype": "float32",
    }
    recipe = str(write_recipe(model={"model_config": sizes}, optimizer__learning_rate=0.01, run_mode="train"))
    assert main([recipe]) == 0
    assert "weights: random numbers from the seed" in capsys.readouterr().err
    assert losses(output)[0] == pytest.approx(np.log(128), rel=0.02)
    assert losses(output)[-1] < 0.9 * losses(output)[0]
    assert main([recipe, "--run_mode", "finetune"]) == 2
    assert "needs weights" in capsys.readouterr().err


def test_an_adapter_over_random_weights_gets_its_base_written(write_recipe, output, tiny_model):
    recipe = yaml.safe_load(write_recipe().read_text())
    pet = recipe["model"].pop("pet_config")
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 128, "multiple_of": 16}
    dtypes = {"compute_dtype": "float32", "param_init_type": "float32"}
    path = write_recipe(model={"model_config": {**sizes, **dtypes, "pet_config": pet}}, run_mode="train")
    assert main([str(path), "--epochs", "1"]) == 0
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(output / "model")
    assert (output / "model" / "model.safetensors").is_file()


def test_predicting(write_recipe, output, tmp_path, tiny_model, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "prompts.txt"
    file.write_text("w9 w12 w15\n\nw40 w43\n")
    words = ["--run_mode", "predict", "--predict_data", str(file), "w3", "--model.max_new_tokens", "6"]
    assert main([str(write_recipe()), *words, "--predict_batch_size", "2"]) == 0
    predictions = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [entry["prompt"] for entry in predictions] == ["w9 w12 w15", "w40 w43", "w3"]
    assert f"> w3\n{predictions[2]['answer']}" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for entry in predictions:
        given = tokenizer(entry["prompt"], return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0)
        answer = tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        assert entry["answer"] == answer.strip()


def test_eval_takes_the_training_data_when_only_that_is_given(write_recipe, output, tiny_data, capsys):
    assert main([str(write_recipe()), "--run_mode", "eval"]) == 0
    captured = capsys.readouterr()
    assert "train_dataset is evaluated" in captured.err
    supervised = sum(int((row["labels"][1:] != -100).sum()) for row in counting_rows(48, seed=1))
    assert f"over {supervised:,} supervised tokens" in captured.out


def test_a_dry_run_tells_the_plan_without_a_framework(write_recipe, output):
    recipe = write_recipe(lr_schedule={"type": "CosineWithWarmUpLR", "warmup_ratio": 0.125})
    program = (
        "import sys; from msft.cli.train import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'mindspore', 'transformers', 'peft'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(recipe), "--dry_run"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "steps: 24" in done.stderr and "warm-up 3 of 24 steps" in done.stderr
    assert "LoRA rank 4, alpha 8, dropout 0, 8 modules: 1,792 parameters" in done.stderr
    assert not output.exists()


def test_errors_come_before_a_framework_all_at_once(write_recipe, tmp_path):
    recipe = write_recipe(runner_config__epoch=3, optimizer__learning_rate="fast", name="wrong.yaml")
    program = (
        "import sys; from msft.cli.train import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'mindspore'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(recipe)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean 'epochs'?" in done.stderr and "learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "changes, words, message",
    [
        ({}, ["--train_dataset_dir", "nowhere.mindrecord"], "nowhere.mindrecord does not exist"),
        ({}, ["--load_checkpoint", "nowhere"], "nowhere does not exist"),
        ({"model__pet_config__target_modules": ".*wz"}, [], "'.*wz' matches no module"),
        ({"model__pretrained": "no_model"}, [], "no_model is no Hugging Face folder"),
        ({"train_dataset__input_columns": ["ids"]}, [], "has no column 'ids'"),
        ({"runner_config__batch_size": 100}, [], "do not fill one step of 100"),
        ({}, ["--device", "cuda"], "sees none here"),
        ({}, ["--resume_training", "nowhere"], "nowhere holds no whole checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(write_recipe, output, capsys, changes, words, message):
    assert main([str(write_recipe(**changes)), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not output.exists()


def test_which_recipe(capsys):
    assert main([]) == 2
    assert "which recipe?" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "--dry_run" in capsys.readouterr().out


def test_an_adapter_that_does_not_fit_the_recipe(write_recipe, output, tmp_path, capsys):
    recipe = str(write_recipe())
    assert main([recipe, "--runner_config.stop_step", "1"]) == 0
    adapter = ["--load_checkpoint", str(output / "adapter"), "--output_dir", str(tmp_path / "other")]
    assert main([recipe, *adapter, "--model.pet_config.lora_rank", "8"]) == 2
    assert "has rank 4, pet_config.lora_rank is 8" in capsys.readouterr().err
    assert main([recipe, *adapter, "--model.pet_config.lora_alpha", "16"]) == 2
    assert "alpha 8, pet_config.lora_alpha is 16" in capsys.readouterr().err
    assert main([str(write_recipe(model__pet_config=None)), *adapter]) == 2
    assert "the recipe has no pet_config" in capsys.readouterr().err


def test_a_run_that_fails_exits_with_1(write_recipe, output, capsys):
    recipe = str(write_recipe(optimizer__learning_rate=1e30, runner_wrapper={"use_clip_grad": False}))
    assert main([recipe, "--model.pet_config=null"]) == 1
    error = capsys.readouterr().err
    assert "the loss is" in error and "Traceback" not in error
    assert not (output / "model").exists()


def test_run_finetune_is_the_same_command(write_recipe, output):
    recipe = write_recipe()
    words = ["--config", str(recipe), "--register_path", "research", "--dry_run"]
    done = subprocess.run([sys.executable, "run_finetune.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--register_path does nothing here" in done.stderr and "steps: 24" in done.stderr
