"""Protects the newcomer's first command: `make demo` from a clean clone (slow: installs, downloads, trains twice)."""

import re
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def test_make_demo_from_a_clean_clone(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    began = time.monotonic()
    done = subprocess.run(["make", "demo"], cwd=clone, capture_output=True, text=True)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert seconds < 15 * 60
    out = done.stdout
    assert float(re.search(r"largest difference: (\S+)", out)[1]) < 1e-2
    steps = re.findall(r"^ *\d+ +(\d+\.\d{6}) +(\d+\.\d{6})", out, flags=re.M)
    assert len(steps) == 28 and float(steps[-1][0]) < 0.2 < 2 < float(steps[0][0])
    for engine in ("torch", "mindspore"):
        before = re.findall(rf"{engine}, before: (.*)", out)
        after = re.findall(rf"{engine}, after: +(.*)", out)
        assert len(before) == len(after) == 3
        assert "MindSpore" in after[0] and "MindSpore" not in before[0]
        assert "backend" in after[1] and "msft merge" in after[2]
        assert (clone / "output" / "quickstart" / engine / "adapter" / "adapter_model.safetensors").is_file()
    assert (clone / "output" / "quickstart" / "training_loss.png").read_bytes().startswith(b"\x89PNG")


def test_both_engines_say_what_transformers_says_on_the_demo_model(tmp_path):
    import json
    import sys

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_path = tmp_path / "SmolLM2-135M-Instruct"
    fetch = [sys.executable, str(ROOT / "scripts" / "fetch_model.py"), "--output_path", str(model_path)]
    subprocess.run(fetch, check=True, cwd=tmp_path)
    prompts = ["What is the capital of France?", "Write a short poem about the sea.", "Name three colors."]
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    expected = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        whole = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)
        expected.append(tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True))
    for engine in ("torch", "mindspore"):
        words = ["generate", "--model", str(model_path), "--backend", engine, "--max_new_tokens", "64"]
        words += [word for prompt in prompts for word in ("--prompt", prompt)]
        done = subprocess.run([sys.executable, "-m", "msft", *words], capture_output=True, text=True, check=True)
        assert [json.loads(line)["answer"] for line in done.stdout.splitlines()] == expected
