"""Protects `msft list` and `msft recipe` as their users see them: text, JSON, files, errors, and that they are fast."""

import ast
import json
import resource
import subprocess
import sys

import pytest
import yaml

from msft.cli.main import main
from msft.models.families import FAMILIES


def run(capsys, *words, code=0):
    assert main([*words]) == code
    return capsys.readouterr()


def test_all_families_with_their_sizes(capsys):
    said = run(capsys, "list").out
    assert [line.split()[0] for line in said.split("\n\n")[0].splitlines() if line[0] != " "] == list(FAMILIES)
    assert "\nqwen2      0.5b (494M), 1.5b (1.54B), 3b (3.09B), 7b (7.62B), " in said
    assert "LoRA on qkv_proj, o_proj; template: the tokenizer's, else vicuna_v1.1; CKPT in Hugging Face names" in said
    assert "Verified here for every family, on CPU: logits and gradients, generation and packing, training" in said
    assert max(map(len, said.splitlines())) < 120


def test_one_family_with_what_was_verified(capsys):
    said = run(capsys, "list", "chatglm").out
    assert said.startswith("chatglm: ChatGLMModel (not in transformers: a class that computes the same is used)\n")
    assert (
        "  4-9b  glm-4-9b-chat  9,399,951,360      40   4,096     32          2     151,552  131,072     no\n" in said
    )
    assert "    tests/convert/test_file_names.py::test_files_hold_what_the_family_says\n" in said
    assert "tensor parallel" not in said and "  tensor parallel\n" in run(capsys, "list", "llama").out


def test_json_has_what_the_text_says(capsys):
    entries = json.loads(run(capsys, "list", "--json").out)
    assert [entry["family"] for entry in entries] == list(FAMILIES)
    one = json.loads(run(capsys, "list", "qwen2.5", "--json").out)
    assert one in entries and one["sizes"]["7b"]["parameters"] == 7_615_616_512 and one["template"] == "qwen-7b-chat"
    assert one["mindformers_names"] and one["sizes"]["7b"]["dealt"]
    assert {check["what"] for check in one["verified"]} >= {"training", "conversion"}


def test_the_list_is_fast_and_imports_nothing_heavy():
    code = "import sys; from msft.cli.main import main; main(['list']); print(sorted(sys.modules), file=sys.stderr)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    heavy = {"torch", "mindspore", "transformers", "peft", "pydantic", "rich", "yaml", "fastchat"}
    assert not set(ast.literal_eval(done.stderr.strip().splitlines()[-1])) & heavy


def test_a_recipe_is_printed_or_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("recipe", "--model", "qwen2", "--size", "7b", "--method", "lora")
    printed = run(capsys, *words).out
    assert yaml.safe_load(printed)["model"]["pretrained"] == "Qwen2.5-7B-Instruct"
    said = run(capsys, *words, "--output_path", "deep/x.yaml", "--pretrained", "m", "--devices", "8").err
    assert said == "written: deep/x.yaml\n"
    text = (tmp_path / "deep" / "x.yaml").read_text()
    assert "#   msft train deep/x.yaml --train_dataset_dir" in text and "data_parallel: 8" in text
    assert not (tmp_path / "m").exists()


def test_the_published_config_is_enough_for_an_estimate(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("recipe", "--model", "mistral", "--size", "7b-v0.3", "--method", "full", "--output_path", "x.yaml")
    said = run(capsys, *words, "--write_config").err
    assert "written: Mistral-7B-Instruct-v0.3/config.json, the published sizes" in said
    said = run(capsys, "estimate", "x.yaml", "--device", "ascend910b").out
    assert "model: mistral, 32 layers, hidden 4096, 7,248,023,552 parameters; tuned (full)" in said
    (tmp_path / "Mistral-7B-Instruct-v0.3" / "config.json").write_text("{}")
    assert "is there already and stays as it is" in run(capsys, *words, "--write_config").err
    assert (tmp_path / "Mistral-7B-Instruct-v0.3" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("list qwen", "msft list: unknown model family 'qwen', did you mean 'qwen3'? (known: baichuan, bloom,"),
        ("recipe --model lama --size 7b --method lora", "--model: unknown model family 'lama', did you mean 'llama'?"),
        ("recipe --model gemma --size 9b --method lora", "--size: gemma has no size '9b'"),
        ("recipe --model gemma --size 2b --method lora --devices 0", "--devices: must be 1 or more, not 0"),
    ],
)
def test_a_mistake_is_one_clear_line(capsys, words, message):
    said = run(capsys, *words.split(), code=2).err
    assert message in said and said.count("\n") == 1
