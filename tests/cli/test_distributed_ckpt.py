"""MindFormers' distributed checkpoints through the command line: what is read from slices is what the whole holds."""

import json
import os
import shlex
import shutil

import numpy as np
import pytest

from msft.cli.convert_weight import main as convert_weight
from msft.cli.generate import main as generate
from msft.cli.merge import main as merge
from msft.cli.train import main as train
from msft.convert.ckpt import read_index
from msft.convert.open import open_weights, read_spec
from msft.convert.stored import StoredTensors
from msft.models import llama
from msft.models.adapters import peft_names, peft_to_mindformers
from msft.models.shapes import tensor_shapes
from tests.convert.mindspore_ranks import llama_cuts, write_distributed

KEY = "--src_strategy_path_or_dir"


def arrays_of(source):
    return {llama.MINDFORMERS.write(name): source.read(name) for name in source.tensors}


def cut(folder, arrays):
    """Write arrays as 2 stages of data 2 x model 2 with the optimizer's shards; returns (checkpoint, strategy)."""
    stages = [{}, {}]
    for name, array in arrays.items():
        stages[".layers.1." in name or "norm_out" in name or "lm_head" in name][name] = array
    return write_distributed(folder, arrays, [llama_cuts(stage, 2, 2, -1) for stage in stages])


@pytest.fixture(scope="module")
def distributed(tiny_model, tmp_path_factory):
    return cut(tmp_path_factory.mktemp("distributed"), arrays_of(open_weights(tiny_model)))


@pytest.fixture(scope="module")
def factors(tiny_model):
    """LoRA factors of attention's matrices under PEFT's names."""
    generator, shapes, result = np.random.default_rng(0), tensor_shapes(read_spec(tiny_model)), {}
    for name, (rows, columns) in [(name, shapes[name]) for name in shapes if ".self_attn." in name]:
        first, second = peft_names(name.removesuffix(".weight"))
        result[first] = generator.normal(0, 0.3, (4, columns)).astype(np.float32)
        result[second] = generator.normal(0, 0.3, (rows, 4)).astype(np.float32)
    return result


@pytest.fixture(scope="module")
def distributed_lora(tiny_model, factors, tmp_path_factory):
    """Base model and adapter in one distributed checkpoint, as MindFormers' LoRA training saves them."""
    adapters = {peft_to_mindformers(name, llama.FAMILY): array for name, array in factors.items()}
    return cut(tmp_path_factory.mktemp("lora"), arrays_of(open_weights(tiny_model)) | adapters)


def convert(source, target, *more) -> int:
    return convert_weight(
        ["--model", "llama", "--input_path", str(source), "--output_path", str(target), *map(str, more)]
    )


def with_an_older_step(checkpoint, place):
    """A copy of a distributed checkpoint in which each rank has a second, older CKPT."""
    shutil.copytree(checkpoint, place)
    for rank in place.iterdir():
        [file] = rank.iterdir()
        older = file.with_name(file.name.replace("1_2", "1_1"))
        older.write_bytes(b"not read")
        os.utime(older, (1000, 1000))


def equal(left, right) -> bool:
    first, second = open_weights(left), open_weights(right)
    return first.tensors == second.tensors and all(
        first.read(name).tobytes() == second.read(name).tobytes() for name in first.tensors
    )


def test_convert_weight_gives_the_original_back(distributed, tiny_model, tmp_path, capsys):
    checkpoint, strategy = distributed
    assert convert(checkpoint, tmp_path / "hf", "--reversed", "--config", tiny_model, KEY, strategy) == 0
    assert f"wrote {tmp_path / 'hf'}" in capsys.readouterr().out
    assert equal(tmp_path / "hf", tiny_model)
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert convert(checkpoint, tmp_path / "x.ckpt", "--config", tiny_model, KEY, strategy) == 0
    assert equal(tmp_path / "x.ckpt", tiny_model)


def test_the_config_and_the_tokenizer_are_found_beside_rank_0(distributed, tiny_model, tmp_path):
    with_an_older_step(distributed[0], tmp_path / "place")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny_model / name, tmp_path / "place")
    assert convert(tmp_path / "place", tmp_path / "hf", "--reversed", KEY, distributed[1]) == 0
    assert equal(tmp_path / "hf", tiny_model) and (tmp_path / "hf" / "tokenizer.json").is_file()


@pytest.mark.parametrize("inside", ["", "rank_3", "rank_3/llama_rank_3-1_2.ckpt"])
def test_slices_without_a_strategy_are_refused_with_the_option(distributed, tiny_model, tmp_path, capsys, inside):
    checkpoint, strategy = distributed
    assert convert(checkpoint / inside, tmp_path / "hf", "--reversed", "--config", tiny_model) == 2
    error = capsys.readouterr().err
    assert f"{checkpoint}: holds files of 8 ranks, and one rank's alone do not fit" in error
    assert f"give {KEY}: the strategy file" in error and f"{strategy} looks like it" in error
    assert "'model.layers.0.self_attn.q_proj.weight'" in error
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("of_file", [False, True])
def test_a_strategy_for_what_is_no_folder_of_ranks(distributed, tiny_model, tmp_path, capsys, of_file):
    path = tiny_model / "model.safetensors" if of_file else tiny_model
    assert convert(path, tmp_path / "x.ckpt", KEY, distributed[1]) == 2
    assert f"{path}: is no folder of rank_0, rank_1, ..." in capsys.readouterr().err


def test_a_damaged_slice_is_seen_before_the_result_is(distributed, tiny_model, tmp_path, capsys):
    """MindSpore's checksum is verified for every rank; without one, a file that is cut off is still seen."""
    import mindspore

    shutil.copytree(distributed[0], tmp_path / "place")
    file = tmp_path / "place" / "rank_5" / "llama_rank_5-1_2.ckpt"
    parameters = mindspore.load_checkpoint(str(file))
    data = [{"name": name, "data": value} for name, value in parameters.items()]
    mindspore.save_checkpoint(data, str(file), crc_check=True)
    words = ("--reversed", "--config", tiny_model, KEY, distributed[1])
    assert convert(tmp_path / "place", tmp_path / "sound", *words) == 0
    content = bytearray(file.read_bytes())
    content[read_index(file).tensors["lm_head.weight"].extents[0][0]] ^= 1
    for damaged in (content, content[:-2000]):
        file.write_bytes(damaged)
        capsys.readouterr()
        assert convert(tmp_path / "place", tmp_path / "hf", *words) == 2
        assert f"{file}: " in capsys.readouterr().err
        assert not (tmp_path / "hf").exists()


def test_a_recipe_loads_slices(distributed, write_recipe, tiny_model, tmp_path, capsys):
    """Full fine-tuning from slices goes through the same losses as from the whole model."""
    config = json.loads((tiny_model / "config.json").read_text())
    with_an_older_step(distributed[0], tmp_path / "place")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    recipe = str(write_recipe(model__pet_config=None, model__pretrained=str(tmp_path / "empty"), auto_trans_ckpt=True))
    losses = []
    for number, words in enumerate(
        (
            ["--load_checkpoint", str(tiny_model)],
            ["--load_checkpoint", str(tmp_path / "place"), KEY, str(distributed[1])],
        )
    ):
        output = tmp_path / f"output-{number}"
        words = [*words, "--output_dir", str(output), "--runner_config.stop_step", "3"]
        assert train([recipe, *words]) == 0
        lines = (output / "trainer_log.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if "loss" in record])
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert "auto_trans_ckpt" in capsys.readouterr().err


def test_the_next_command_after_lora_on_slices_works(distributed, write_recipe, tmp_path, capsys):
    words = ["--load_checkpoint", str(distributed[0]), KEY, str(distributed[1]), "--runner_config.stop_step", "1"]
    assert train([str(write_recipe()), *words]) == 0
    said = capsys.readouterr()
    [line] = [line for line in (said.out + said.err).splitlines() if line.startswith("next: ")]
    command = shlex.split(line.removeprefix("next: "))
    assert command[:4] == ["msft", "merge", "--model", str(distributed[0])]
    assert merge(command[2:]) == 0
    assert (tmp_path / "output" / "merged" / "model.safetensors").is_file()


def test_a_recipe_refuses_slices_without_a_strategy(distributed, write_recipe, capsys):
    recipe = str(write_recipe())
    assert train([recipe, "--load_checkpoint", str(distributed[0]), "--dry_run"]) == 2
    assert "if they are slices, name src_strategy_path_or_dir: the strategy file" in capsys.readouterr().err
    assert train([recipe, "--load_checkpoint", str(distributed[0]), KEY, "nowhere", "--dry_run"]) == 2
    assert f"{KEY}: src_strategy_path_or_dir: nowhere does not exist" in capsys.readouterr().err
    assert train([recipe, KEY, str(distributed[1]), "--dry_run"]) == 0
    said = capsys.readouterr()
    assert "it joins the slices of load_checkpoint, which is not set" in said.out + said.err


def test_an_adapter_in_slices(distributed_lora, factors, write_recipe, tiny_model, tmp_path, capsys):
    """Adapter and base of MindFormers' distributed LoRA training: evaluated, and merged, as from one CKPT."""
    checkpoint, strategy = distributed_lora
    whole = tmp_path / "whole.ckpt"
    source = StoredTensors(read_index(checkpoint / "rank_0" / "llama_rank_0-1_2.ckpt").tensors)
    name = "model.layers.0.attention.wq.mindpet_delta_lora_b"
    assert source.read(name).shape == (8, 4)  # of 32 rows: model 2, and 2 shards
    _write_whole(whole, tiny_model, factors)
    values = []
    recipe = str(write_recipe(model__pet_config__target_modules=[".*wq|.*wk|.*wv|.*wo"]))
    for number, words in enumerate(
        (["--load_checkpoint", str(whole)], ["--load_checkpoint", str(checkpoint), KEY, str(strategy)])
    ):
        place = tmp_path / f"evaluation-{number}"
        words = [*words, "--run_mode", "eval", "--output_dir", str(place)]
        assert train([recipe, *words]) == 0
        values.append(json.loads((place / "eval_summary.json").read_text())["loss"])
    assert values[0] == values[1]
    words = ["--lora_alpha", "8", "--output_path"]
    assert merge(["--model", str(tiny_model), "--adapter", str(whole), *words, str(tmp_path / "a")]) == 0
    of_slices = ["--adapter", str(checkpoint), KEY, str(strategy), *words]
    assert merge(["--model", str(tiny_model), *of_slices, str(tmp_path / "b")]) == 0
    assert merge(["--model", str(checkpoint), "--config", str(tiny_model), *of_slices, str(tmp_path / "c")]) == 0
    assert equal(tmp_path / "a", tmp_path / "b") and equal(tmp_path / "a", tmp_path / "c")
    assert not equal(tmp_path / "a", tiny_model)
    capsys.readouterr()
    assert merge(["--model", str(tiny_model), "--adapter", str(checkpoint), *words, str(tmp_path / "d")]) == 2
    assert f"if they are slices, give {KEY}" in capsys.readouterr().err
    assert (
        merge(["--model", str(tiny_model), "--adapter", str(whole), KEY, str(strategy), *words, str(tmp_path / "d")])
        == 2
    )
    assert "neither --model nor --adapter is a folder of rank_0, rank_1, ..." in capsys.readouterr().err


def _write_whole(path, model, factors):
    import mindspore

    arrays = arrays_of(open_weights(model)) | {
        peft_to_mindformers(name, llama.FAMILY): array for name, array in factors.items()
    }
    mindspore.save_checkpoint(
        [{"name": name, "data": mindspore.Tensor(array)} for name, array in arrays.items()], str(path)
    )


def test_generate_says_how_to_join(distributed, tiny_model, tmp_path, capsys):
    shutil.copytree(distributed[0], tmp_path / "place")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path / "place")
    assert generate(["--model", str(tmp_path / "place"), "--backend", "torch", "--raw", "--prompt", "w5"]) == 2
    assert f"join them with msft convert_weight or merge {KEY}: the strategy file" in capsys.readouterr().err
