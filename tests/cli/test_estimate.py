"""Protects `msft estimate` as its users see it: the tables, the JSON, the errors, and that it starts nothing."""

import json
import re
import resource
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from msft.cli.main import main

LLAMA2 = Path(__file__).parents[2] / "configs" / "llama2"
LORA, FULL = str(LLAMA2 / "lora_llama2_7b.yaml"), str(LLAMA2 / "finetune_llama2_13b.yaml")


def run(capsys, *words, code=0):
    assert main(["estimate", *words]) == code
    return capsys.readouterr()


def test_tables_and_answers(capsys):
    said = run(capsys, FULL, "--device", "ascend910b", "--devices", "8")
    assert "13,015,864,320 parameters; tuned (full): 13,015,864,320 (100 %)" in said.out
    assert "step: 4 rows of 4,096 tokens x 1 micro-batches x data 8 = 131,072 tokens, products in float16" in said.out
    for row in ("gradients between devices", "optimizer's moments", "tokens/s a device", "recompute (the recipe)"):
        assert row in said.out
    sizes = re.search(r"best layout for 8 ascend910b: data (\d) x tensor (\d) x pipeline (\d)", said.out).groups()
    assert prod(map(int, sizes)) == 8 and sizes != ("8", "1", "1")
    assert "because: the fastest that fits: unsplit, a device needs" in said.out
    assert "every token supervised" in said.err


def test_the_json_has_what_the_tables_say(capsys, tmp_path):
    path = tmp_path / "deep" / "estimate.json"
    said = run(capsys, LORA, "--device", "ascend910b", "--json", str(path))
    found = json.loads(path.read_text())
    assert f"written: {path}" in said.err
    plan = found["plans"]["no_recompute"]
    assert [plan["layout"][name] for name in ("data", "tensor", "pipeline")] == [8, 1, 1]
    assert not found["recompute_in_recipe"]
    assert found["tuned_parameters"] == 16_777_216
    parts = [value for name, value in plan["memory"].items() if name not in ("total", "moment")]
    assert sum(parts) == pytest.approx(plan["memory"]["total"])
    assert f"{plan['memory']['total'] / 1e9:.2f}" in said.out and f"{plan['speed']['tokens']:,.0f}" in said.out
    assert f"{found['largest_rows']['recompute']}" in said.out and found["reason"] in said.out


def test_flags_change_the_recipe(capsys):
    rank = run(capsys, LORA, "--model.model_config.pet_config.lora_rank", "32", "--batch_size", "1")
    assert "tuned (LoRA rank 32): 33,554,432" in rank.out and "step: 1 rows" in rank.out
    assert "8 ascend910b" in rank.out
    assert "4 a100" in run(capsys, LORA, "--backend", "torch", "--devices", "4").out
    assert "one a100" in run(capsys, LORA, "--backend", "torch", "--use_parallel", "False").out


def test_this_machine_is_the_cpu(capsys):
    names = ("compute_dtype", "param_init_type", "softmax_compute_type", "rotary_dtype")
    words = [f"model.model_config.{name}=float32" for name in names]
    said = run(capsys, LORA, *words, "model.model_config.num_layers=2", "--use_parallel=False", "--device", "cpu")
    assert "this machine, measured with numpy" in said.out and "one cpu" in said.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "which recipe?"),
        ((LORA, "--device", "a1000"), "--device: unknown device 'a1000', did you mean 'a100'? (known: ascend910b, "),
        ((LORA, "--device", "cpu"), "MindSpore has no bfloat16 matrix product on CPU"),
        ((LORA, "--devices", "0"), "--devices is 0, it must be 1 or more"),
        ((LORA, "--devices", "many"), "argument --devices: invalid int value: 'many'"),
        ((LORA, "--parallel_config.model_parallel", "3", "--devices", "9"), "which does not divide 32 heads"),
        ((LORA, "--parallel_config.model_paralel", "3"), "did you mean 'model_parallel'?"),
        (("nowhere.yaml",), "nowhere.yaml"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(words, said):
    done = subprocess.run([sys.executable, "-m", "msft", "estimate", *words], capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_problems_of_device_and_layout_are_told_at_once(capsys):
    words = ("--device", "a1000", "--devices", "7", "--parallel_config.model_parallel", "3")
    said = run(capsys, LORA, *words, code=2).err
    assert "unknown device" in said and "--devices is 7" in said and "does not divide 32 heads" in said


def test_it_is_fast_and_imports_no_framework():
    code = f"import sys; from msft.cli.main import main; main(['estimate', {FULL!r}]); print(*sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    assert not {"torch", "mindspore", "transformers", "peft"} & set(done.stdout.splitlines()[-1].split())


def test_parallel_mode_1_tells_what_mindspore_would_be_told(capsys):
    words = [FULL, "--device", "ascend910b", "--devices", "8", "--parallel_config.data_parallel", "2"]
    words += ["--parallel_config.model_parallel", "4"]
    assert "set_auto_parallel_context" not in run(capsys, *words).out
    out = run(capsys, *words, "--parallel.parallel_mode", "1").out
    assert "parallel_mode: semi_auto_parallel" in out and "wo, w2: ((2, 4), (1, 4))" in out
