"""Protects a T5's way through the command line: rows, training on both engines alike, answers, a merged model."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from msft.convert.random_weights import RandomWeights
from msft.convert.weights import write_hf_folder
from msft.models.families import spec_from_hf
from tests.conformance.families import CONFIGS
from tests.conformance.tiny_engines import ENGINES

WORDS = 128


def run(*words, cwd):
    done = subprocess.run([sys.executable, "-m", "msft", *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def model_of(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    spec = spec_from_hf({**CONFIGS["t5, gated, with a head"], "vocab_size": WORDS})
    write_hf_folder(RandomWeights(spec, 7), spec, folder, bar=False)
    words = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(3, WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))


def rows():
    """Answers that repeat three words, whatever is asked."""
    generator = np.random.default_rng(0)
    asked = generator.integers(3, WORDS, (32, 4))
    return [{"instruction": f"w{a} w{b}", "input": f"w{c} w{d}", "output": "w50 w60 w70"} for a, b, c, d in asked]


def recipe_of(engine, output_dir, **more):
    """A recipe of adapters on every linear module."""
    return {
        "backend": engine,
        "device": "cpu",
        "output_dir": output_dir,
        "run_mode": "finetune",
        "model": {"pretrained": "model", "pet_config": {"pet_type": "lora", "lora_rank": 8, "target_modules": ".*"}},
        "runner_config": {"epochs": 4, "batch_size": 8},
        "optimizer": {"type": "AdamW", "learning_rate": 0.02},
        "train_dataset": {"data_loader": {"dataset_dir": "a.mindrecord"}, "padding": "max_length"},
        "callbacks": [{"type": "MFLossMonitor"}],
        **more,
    }


def prepared(folder):
    """The model and its rows."""
    model_of(folder / "model")
    (folder / "alpaca.json").write_text(json.dumps(rows()))
    words = "llama_preprocess --dataset_type qa --input_glob alpaca.json --model_file model --seq_length 12"
    return run(*words.split(), "--output_file", "a.mindrecord", cwd=folder)


def losses_of(folder):
    log = (folder / "trainer_log.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, log) if "loss" in record]


@pytest.mark.families
def test_a_t5_learns_on_both_engines_alike_and_its_results_are_used(tmp_path):
    assert "for an encoder-decoder" in prepared(tmp_path)
    losses = {}
    for engine in ENGINES:
        (tmp_path / f"{engine}.yaml").write_text(yaml.safe_dump(recipe_of(engine, engine)))
        run("train", f"{engine}.yaml", cwd=tmp_path)
        losses[engine] = losses_of(tmp_path / engine)
    np.testing.assert_allclose(losses["torch"], losses["mindspore"], rtol=1e-4, atol=1e-6)
    assert losses["torch"][-1] < 0.5 * losses["torch"][0]
    adapter = json.loads((tmp_path / "torch" / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_2_SEQ_LM"
    run("merge", "--model", "model", "--adapter", "torch/adapter", "--output_path", "merged", cwd=tmp_path)
    asked = "--prompt", "w4 w7 w10 w20", "--max_new_tokens", "6"
    answers = [
        run("generate", *place, "--backend", engine, *asked, cwd=tmp_path)
        for engine in ENGINES
        for place in (("--model", "model", "--adapter", "mindspore/adapter"), ("--model", "merged"))
    ]
    assert set(answers) == {"w50 w60 w70\n"}
    asked = {"predict_data": ["w4 w7 w10 w20"], "processor": {"tokenizer": {"vocab_file": "model"}}}
    predict = recipe_of("torch", "said", model={"pretrained": "merged"}, **asked) | {"run_mode": "predict"}
    (tmp_path / "predict.yaml").write_text(yaml.safe_dump(predict))
    run("train", "predict.yaml", cwd=tmp_path)
    (line,) = (tmp_path / "said" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["answer"] == "w50 w60 w70"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_that_share_batches_and_moments_equal_one(tmp_path, engine):
    prepared(tmp_path)
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(recipe_of("torch", "one")))
    run("train", "one.yaml", cwd=tmp_path)
    shared = {"use_parallel": True, "parallel": {"enable_parallel_optimizer": True}}
    halved = {"runner_config": {"epochs": 4, "batch_size": 4}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(recipe_of(engine, "two", **shared, **halved)))
    run("launch", "two.yaml", "--nproc_per_node", "2", cwd=tmp_path)
    found = (losses_of(tmp_path / name) for name in ("two", "one"))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)
