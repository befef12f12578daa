"""Protects `msft parity` and `msft train` on every family, through the command line."""

import json
import subprocess
import sys

import pytest

from msft.convert.random_weights import RandomWeights
from msft.convert.weights import write_hf_folder
from msft.models.families import spec_from_hf
from tests.conformance.families import CONFIGS
from tests.conftest import VOCABULARY, recipe_writer, write_tokenizer

TOGETHER = ("internlm2", "gpt2")


def model_of(name, folder):
    config = {**CONFIGS[name]}
    config["padded_vocab_size" if "padded_vocab_size" in config else "vocab_size"] = VOCABULARY
    spec = spec_from_hf(config)
    write_hf_folder(RandomWeights(spec, 7), spec, folder, bar=False)
    write_tokenizer(folder)
    return folder


def run(*words, cwd):
    done = subprocess.run([sys.executable, "-m", "msft", *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.families
@pytest.mark.parametrize("name", [name for name in CONFIGS if "normed" not in name])
def test_parity_is_green(name, tmp_path):
    """Nine stages with adapters on all linear modules, and again with everything tuned."""
    model_of(name, tmp_path / "model")
    said = run("parity", "--model", "model", "--random_data", cwd=tmp_path)
    assert said.count("parity.json") == 2, said


@pytest.mark.parametrize("name", TOGETHER)
def test_a_model_learns_and_its_results_are_used(name, tmp_path, tiny_data):
    """Training writes an adapter and a merged answer; both commands find the family by its config.json."""
    write = recipe_writer(tmp_path, model_of(name, tmp_path / "model"), tiny_data)
    recipe = write(runner_config={"epochs": 3, "batch_size": 8})
    run("train", str(recipe), cwd=tmp_path)
    log = [json.loads(line) for line in (tmp_path / "output" / "trainer_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    model, adapter = tmp_path / "model", tmp_path / "output" / "adapter"
    run("merge", "--model", str(model), "--adapter", str(adapter), "--output_path", "merged", cwd=tmp_path)
    words = "--prompt", "w4 w7 w10", "--max_new_tokens", "4", "--raw"
    answers = [
        run("generate", *place, *words, cwd=tmp_path)
        for place in (("--model", str(model), "--adapter", str(adapter)), ("--model", "merged"))
    ]
    assert answers[0] == answers[1]
