"""100 steps on both engines, adapters with dropout and then all weights: losses, parameters and words stay together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from msft.cli.parity import main

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"


def check(output):
    """Hold a report against the bars; returns the names of the tensors whose gradients were compared."""
    found = json.loads((output / "parity.json").read_text())
    trajectory = found["stages"]["trajectory"]
    assert found["steps"] == 100 and found["passed"]
    losses = [row for row in trajectory["rows"] if row["name"].startswith("loss of step")]
    assert len(losses) == 100 and all(row["error"] <= 1e-5 for row in losses)
    (parameters,) = (row for row in trajectory["rows"] if row["name"].startswith("all parameters"))
    assert parameters["error"] <= 1e-4
    answers = [row for row in found["stages"]["generation"]["rows"] if row["name"] in ("answer 1", "answer 2")]
    assert len(answers) == 2 and all(len(row["both"]) == 64 for row in answers)
    return [row["name"] for row in found["stages"]["backward"]["rows"] if "cosine" in row]


@pytest.mark.slow
def test_a_small_random_model(tiny_model, tmp_path, capsys):
    words = ["--random_data", "--steps", "100", "--device", "cpu", "--output_dir", str(tmp_path)]
    assert main(["--model", str(tiny_model), *words]) == 0
    assert capsys.readouterr().out.count("are the same run") == 2
    # 7 linear modules a layer with A and B; 9 tensors a layer, embedding, norm and head.
    tuned = check(tmp_path / "lora")
    assert len(tuned) == 2 * 7 * 2 and all(".lora_" in name for name in tuned)
    assert len(check(tmp_path / "full")) == 2 * 9 + 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_demo_model_on_the_demo_data(tmp_path, kind):
    """The quickstart's recipe at the rates that are usual for adapters (1e-4) and for all weights (1e-5)."""
    subprocess.run(["make", "model"], cwd=ROOT, check=True)
    data = tmp_path / "quickstart.mindrecord"
    words = ["--dataset_type", "qa", "--input_glob", "configs/quickstart_alpaca.json", "--template", "chat"]
    words += ["--model_file", str(MODEL), "--seq_length", "80", "--output_file", str(data)]
    subprocess.run([sys.executable, "-m", "msft", "llama_preprocess", *words], cwd=ROOT, check=True)
    words = ["--batch_size", "4", "--epochs", "5", "--steps", "100", "--train_dataset_dir", str(data)]
    words += ["--model.pretrained", str(MODEL), "--device", "cpu", "--output_dir", str(tmp_path / kind)]
    words += ["--lr_schedule.learning_rate", "1.e-4" if kind == "lora" else "1.e-5"]
    words += [] if kind == "lora" else ["--model.pet_config", "null"]
    assert main([str(ROOT / "configs" / "quickstart.yaml"), *words]) == 0
    check(tmp_path / kind)
