"""Protects the README: every command in it runs as written, in its order, and leaves what the README says.

The commands run in a folder that looks like a checkout, with small random models in the places of the real ones.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from msft.models.llama import MINDFORMERS
from tests.cli.foreign_files import write_foreign_files
from tests.cli.readme import (
    ACTIVATE,
    BLOCKS,
    CHAT_MODEL,
    DRY_RUN,
    FLAGS,
    INSTALL,
    LAYOUTS,
    LLAMA,
    README,
    ROOT,
    SIZES,
    TARGETS,
    adapted,
    blocks,
    command_of,
    fences,
    in_block,
    spans,
)
from tests.data.text_folders import CHATML, train_sentencepiece, write_config
from tests.launch.jobs import alone


class Checkout(NamedTuple):
    """A folder with the project in it, and a user's shell there; `said` keeps what each command printed."""

    path: Path
    said: dict[str, str]

    def run(self, command):
        """Run a command in bash, after the README's activation of the environment; returns what it printed."""
        own = str(Path(sys.executable).parent)
        folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if folder != own]
        environment = {**os.environ, "PATH": os.pathsep.join(folders)}
        for name in ("PYTHONPATH", "VIRTUAL_ENV"):
            environment.pop(name, None)
        # `timeout` ends the launcher's processes too.
        shell = ["timeout", "--kill-after=10", "300", "bash", "-ec", f"{ACTIVATE.start}\n{command}"]
        done = subprocess.run(shell, cwd=self.path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
        self.said[command] = done.stdout
        return done.stdout

    def run_block(self, number):
        for command, step in in_block(number):
            self.run(adapted(command, step))

    def losses(self, folder):
        log = (self.path / folder / "trainer_log.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, log) if "loss" in record]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "tools", "scripts", "run_finetune.py", "msft"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return Checkout(folder, {})


@pytest.fixture(scope="module")
def quickstart(checkout):
    """The checkout after the quickstart, on a chat model whose tokenizer knows the quickstart's words."""
    size = write_chat_tokenizer(checkout.path / CHAT_MODEL, (ROOT / "configs" / "quickstart_alpaca.json").read_text())
    save_llama(checkout.path / CHAT_MODEL, "float32", vocab_size=size, tie_word_embeddings=True)
    checkout.run_block(1)
    return checkout


@pytest.fixture(scope="module")
def workflow(checkout):
    """The checkout after the MindSpore Transformers workflow, on a sharded float16 model as Llama 2 is one."""
    size = SIZES["vocab_size"]
    train_sentencepiece(checkout.path / LLAMA, vocab_size=size, model_type="bpe", byte_fallback=True)
    save_llama(checkout.path / LLAMA, "float16", vocab_size=size)
    rows = [
        {"instruction": "Say the next number.", "input": f"{number}" * (number % 2), "output": f"It is {number + 1}."}
        for number in range(12)
    ]
    (checkout.path / "alpaca_data.json").write_text(json.dumps(rows))
    with alone():
        checkout.run_block(3)
    return checkout


def write_chat_tokenizer(folder, text):
    """Write a byte-level tokenizer of SmolLM2's kind, trained on a text; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text, "systemuserassistant"] * 2, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    write_config(folder, tokenizer_class="PreTrainedTokenizerFast", chat_template=CHATML, **names)
    return tokenizer.get_vocab_size()


def save_llama(folder, dtype, **config):
    """Save a small random Llama with transformers, in several shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Weights of this size let a random model learn something in few steps.
    sizes |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **config))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="60KB")


def merged_by_peft(base, adapter):
    """The weights that peft merges, by name, in float32."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return {name: value.numpy() for name, value in model.merge_and_unload().state_dict().items()}


def test_every_command_is_known_here():
    assert not {"", "sh", "shell", "console"} & {language for language, _ in fences()}, "commands stand in bash blocks"
    assert [len(block) for block in blocks()] == [len(block) for block in BLOCKS], "a command came or went"
    for block, steps in zip(blocks(), BLOCKS, strict=True):
        for command, step in zip(block, steps, strict=True):
            adapted(command, step)
    programs = {step.start.split()[0] for block in BLOCKS for step in block}
    assert {span for span in spans() if span.split()[0] in programs} == {*TARGETS, DRY_RUN}
    assert {span for span in spans() if span.startswith("-")} == {*FLAGS, *LAYOUTS}


@pytest.mark.parametrize("target", sorted({step.start for step in INSTALL} | set(TARGETS)))
def test_make_has_the_target_and_its_scripts_and_extras_exist(target, tmp_path):
    for name in ("Makefile", "constraints.txt", "setup.cfg"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run([*shlex.split(target), "-n"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "pip install -c constraints.txt" in done.stdout, done.stderr
    for script in re.findall(r"\bscripts/\S+", done.stdout):
        assert (ROOT / script).is_file()
    for names in re.findall(r"'\.\[(.*?)\]'", done.stdout):
        assert set(names.split(",")) <= set(extras())
    engines = set(re.findall(r"\b(?:torch|mindspore)\b", done.stdout))
    assert engines == {"make demo BACKEND=torch": {"torch"}, "make model": set()}.get(target, {"torch", "mindspore"})


def setup_cfg():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def extras():
    """The extras of setup.cfg with their requirements."""
    return {name: lines.split() for name, lines in setup_cfg()["options.extras_require"].items()}


def test_the_extras_exist_and_admit_the_pinned_versions():
    (command,) = blocks()[2]
    file, named = re.fullmatch(r"pip install -c (\S+) '\.\[(.*)\]'", command).groups()
    listed = re.search(r"^Extras: (.*?)\.\s", README, flags=re.M | re.S)[1]
    assert set(extras()) == set(re.findall(r"`\[(\w+)\]`", listed)) >= set(named.split(","))
    pins = dict(line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    base = setup_cfg()["options"]["install_requires"].split()
    for line in base + [line for lines in extras().values() for line in lines]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


def test_the_quickstarts_rows_all_fit_and_are_learned(quickstart):
    report = json.loads((quickstart.path / "output" / "quickstart.mindrecord.report.json").read_text())
    assert report["rows"] == {"read": 98, "written": 98, "bad": 0, "without_supervision": 0, "cut": 0}
    losses = quickstart.losses("output/quickstart")
    assert len(losses) == 28 and losses[-1] < losses[0] - 0.5


def test_the_quickstarts_adapter_answers_and_is_merged_as_peft_does_it(quickstart):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert quickstart.said[command_of(1, "msft generate")].strip()
    expected = merged_by_peft(quickstart.path / CHAT_MODEL, quickstart.path / "output" / "quickstart" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(quickstart.path / "output" / "merged").state_dict()
    assert merged.keys() == expected.keys()
    for name, value in merged.items():
        np.testing.assert_allclose(value.numpy(), expected[name], atol=1e-5, err_msg=name)
    assert AutoTokenizer.from_pretrained(quickstart.path / "output" / "merged").chat_template == CHATML


def test_the_quickstart_on_the_other_engine_and_with_another_key(quickstart):
    mindspore, decay, *_ = FLAGS
    train = command_of(1, "msft train configs")
    quickstart.run(f"{train} {mindspore} --output_dir output/mindspore")
    ours = quickstart.losses("output/quickstart")
    np.testing.assert_allclose(quickstart.losses("output/mindspore"), ours, atol=1e-4)
    quickstart.run(f"{train} {decay} --output_dir output/decay")
    decayed = quickstart.losses("output/decay")
    assert decayed[0] == ours[0] and decayed[-1] != ours[-1]


def test_a_dry_run_tells_the_plan_and_starts_nothing(quickstart):
    out = quickstart.run(DRY_RUN.replace("RECIPE", "configs/quickstart.yaml") + " --output_dir output/dry")
    assert "nothing was started" in out and not (quickstart.path / "output" / "dry").exists()


def test_the_estimate_tells_the_best_layout(checkout):
    checkout.run_block(8)
    (said,) = (checkout.said[command] for command, _ in in_block(8))
    found = json.loads((checkout.path / "output" / "estimate.json").read_text())
    assert f"because: {found['reason']}" in said
    assert f"tensor {found['best']['layout']['tensor']} x pipeline {found['best']['layout']['pipeline']}" in said


def test_a_familys_recipe_is_written_and_estimated_without_weights(checkout):
    checkout.run_block(10)
    listed, told, _, estimated = (checkout.said[command] for command, _ in in_block(10))
    assert "qwen2      0.5b (494M)" in listed
    assert re.search(r"^  7b +Qwen2.5-7B-Instruct +7,615,616,512 ", told, flags=re.M)
    assert "model: qwen2, 28 layers, hidden 3584, 7,625,709,056 parameters; tuned (LoRA rank 16)" in estimated


def test_both_engines_are_the_same_run(quickstart):
    quickstart.run_block(6)
    quickstart.run_block(7)
    said = [quickstart.said[adapted(command, step)] for number in (6, 7) for command, step in in_block(number)]
    assert "parity: torch and mindspore are the same run" in said[0]
    assert said[1].count("are the same run") == 2
    assert "parity: torch (recorded) and mindspore are the same run" in said[3]
    assert "natural drift of one ulp" in said[4]
    size = sum(path.stat().st_size for path in (quickstart.path / "output" / "golden").iterdir())
    assert size < 1_500_000


def test_the_launchers_lines_are_those_of_the_hostfile(quickstart):
    """The processes themselves are started in the workflow, and by tests/conformance."""
    (quickstart.path / "hosts").write_text(f"127.0.0.9 slots=8\n{socket.gethostname()} slots=8\n")
    quickstart.run_block(9)
    first, second = (quickstart.said[adapted(command, step)] for command, step in in_block(9))
    assert "msft train --config configs/quickstart.yaml --hang_timeout 600" in first
    assert "8118" in second and "127.0.0.9" in second


def test_files_of_llama_factory_and_firefly_train_as_they_are(quickstart):
    """The files are those of the toolkits, with the quickstart's rows as their data."""
    write_foreign_files(quickstart.path)
    quickstart.run_block(11)
    for folder in ("saves/llama3-8b/lora/sft", "output/firefly-qwen1.5-7b-sft-lora"):
        assert len(quickstart.losses(folder)) == 3 and (quickstart.path / folder / "adapter").is_dir()


def test_the_workflows_ckpt_holds_the_base_model(workflow):
    import mindspore

    base = read_safetensors(workflow.path / LLAMA)
    ckpt = mindspore.load_checkpoint(str(workflow.path / "llama2_7b.ckpt"))
    assert set(ckpt) == {MINDFORMERS.write(name) for name in base}
    for name, value in base.items():
        np.testing.assert_array_equal(ckpt[MINDFORMERS.write(name)].asnumpy(), value)


def test_the_workflows_mindrecord_holds_every_row(workflow):
    from mindspore.dataset import MindDataset

    rows = list(MindDataset(str(workflow.path / "alpaca.mindrecord")).create_dict_iterator(output_numpy=True))
    assert len(rows) == 12
    assert all(row["input_ids"].shape == row["labels"].shape == (4097,) for row in rows)
    assert all(0 < (row["labels"] != -100).sum() < (row["input_ids"] != 0).sum() for row in rows)


def test_the_workflow_trains_all_weights_then_adapters_then_on_several_processes(workflow):
    from transformers import AutoModelForCausalLM

    output = workflow.path / "output"
    # 12 rows, 2 epochs; 1 row a step, 2 rows a step, 2 rows a step of 2 processes. Later runs keep the earlier ones.
    for folder, steps in (("output/earlier/run-1", 24), ("output/earlier/run-2", 12), ("output", 6)):
        losses = workflow.losses(folder)
        assert len(losses) == steps and losses[-1] < losses[0] - 1
    assert json.loads((output / "train_summary.json").read_text())["processes"] == 2
    model = AutoModelForCausalLM.from_pretrained(output / "earlier" / "run-1" / "model").state_dict()
    base = read_safetensors(workflow.path / LLAMA)
    assert all((value.float().numpy() != base[name]).any() for name, value in model.items())


def test_a_layout_is_verified_and_parallel_mode_1_told(workflow):
    with alone():
        workflow.run_block(4)
    (verified,) = (workflow.said[adapted(command, step)] for command, step in in_block(4))
    assert "layout: the same run as one process over 2 steps" in verified
    workflow.run_block(5)
    (told,) = (workflow.said[adapted(command, step)] for command, step in in_block(5))
    assert "parallel_mode: semi_auto_parallel" in told


def test_the_workflows_merged_ckpt_is_what_peft_merges(workflow):
    import mindspore

    expected = merged_by_peft(workflow.path / LLAMA, workflow.path / "output" / "adapter")
    base = read_safetensors(workflow.path / LLAMA)
    merged = mindspore.load_checkpoint(str(workflow.path / "llama2_7b_tuned.ckpt"))
    assert set(merged) == {MINDFORMERS.write(name) for name in expected}
    for name, value in expected.items():
        ours = merged[MINDFORMERS.write(name)].asnumpy()
        assert ours.dtype == np.float16
        np.testing.assert_allclose(ours, value, rtol=1e-3, atol=1e-6, err_msg=name)
        tuned = name.endswith(tuple(f"{leaf}_proj.weight" for leaf in "qkvo"))
        assert (ours != base[name]).any() == tuned, name


def test_the_same_recipe_on_the_other_engine(workflow):
    *_, torch, cpu = FLAGS
    lora = command_of(3, "python run_finetune.py --config configs/llama2/lora")
    assert cpu in lora
    workflow.run(f"{lora} {torch} --output_dir output/torch")
    np.testing.assert_allclose(workflow.losses("output/torch"), workflow.losses("output/earlier/run-2"), atol=1e-4)


def read_safetensors(folder):
    from safetensors.numpy import load_file

    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
