"""Protects: `msft generate` as a user calls it, on both engines, against transformers and peft."""

import json
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from msft.backend.contract import Lora
from msft.cli.generate import main
from msft.convert.adapter import write_adapter
from msft.convert.open import read_spec
from msft.models.adapters import peft_names
from msft.models.shapes import linear_modules, tensor_shapes

ENGINES = ("torch", "mindspore")


def generate(*words):
    done = subprocess.run([sys.executable, "-m", "msft", "generate", *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A LoRA adapter of random numbers large enough to change what the tiny model says."""
    spec = read_spec(tiny_model)
    modules = tuple(name for name in linear_modules(spec) if name.endswith(("q_proj", "gate_proj")))
    shapes, generator = tensor_shapes(spec), np.random.default_rng(0)
    weights = {}
    for module in modules:
        rows, columns = shapes[f"{module}.weight"]
        for name, shape in zip(peft_names(module), ((4, columns), (rows, 4)), strict=True):
            weights[name] = generator.normal(0, 0.3, shape).astype(np.float32)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    write_adapter(folder, Lora(4, 8.0, 0.0, modules), weights, str(tiny_model))
    return folder


def expected(tiny_model, adapter, prompt, count):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0, len(prompt) :]
    return [f"w{token}" for token in ids.tolist() if token > 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_answers_are_those_of_transformers_and_peft(engine, tiny_model, adapter):
    words = ("--model", tiny_model, "--backend", engine, "--raw", "--max_new_tokens", "10")
    code, out, err = generate(*words, "--adapter", adapter, "--prompt", "w5 w6 w7", "--prompt", "")
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["w5 w6 w7", ""]
    assert answers[0]["answer"].split() == expected(tiny_model, adapter, [1, 5, 6, 7], 10)
    assert answers[1]["answer"].split() == expected(tiny_model, adapter, [1], 10)
    assert answers[0]["answer"].split() != expected(tiny_model, None, [1, 5, 6, 7], 10)


def test_one_prompt_is_answered_in_plain_text_and_a_stop_text_ends_it(tiny_model, capsys):
    words = ["--model", str(tiny_model), "--backend", "torch", "--raw", "--max_new_tokens", "10"]
    words += ["--prompt", "w5 w6 w7"]
    assert main(words) == 0
    answer = expected(tiny_model, None, [1, 5, 6, 7], 10)
    assert capsys.readouterr().out.split() == answer
    assert main([*words, "--stop", answer[2]]) == 0
    assert capsys.readouterr().out.split() == answer[: answer.index(answer[2])]


def test_all_mistakes_are_told_at_once_before_a_framework_is_imported(tiny_model):
    code, out, err = generate(
        "--model", tiny_model, "--prompt", "a", "--temperature", "-1", "--top_p", "2", "--batch_size", "0", "--stop", ""
    )
    assert code == 2 and out == ""
    flags = [line.split(":")[0] for line in err.splitlines()[1:]]
    assert flags == ["--batch_size", "--temperature", "--top_p", "--stop"]


@pytest.mark.parametrize(
    "words,message",
    [
        (("--model", "nowhere", "--prompt", "a"), "--model: nowhere does not exist"),
        (("--modle", "x", "--model", "nowhere", "--prompt", "a"), "did you mean '--model'?"),
        (("--model", "nowhere"), "one of the arguments --prompt --file is required"),
    ],
)
def test_a_mistake_is_one_clear_line(words, message):
    code, _, err = generate(*words)
    assert code == 2 and message in err and "Traceback" not in err


def test_mindspore_on_cpu_refuses_sixteen_bit_floats_with_the_reason(tiny_model):
    words = ("--model", tiny_model, "--backend", "mindspore", "--raw", "--prompt", "w5", "--dtype", "bf16")
    code, _, err = generate(*words)
    assert code == 2 and "MindSpore's CPU target has no bfloat16 matrix product" in err
