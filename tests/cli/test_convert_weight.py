"""convert_weight through the command line: its arguments, its exit codes, and nothing left behind by a failure."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from msft.cli.convert_weight import main
from msft.convert import ckpt
from msft.convert.open import open_weights
from msft.convert.random_weights import RandomWeights
from msft.convert.weights import write_hf_folder
from msft.models.families import spec_from_hf

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "convert" / "convert_weight.py"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def folder(tmp_path):
    spec = spec_from_hf(CONFIG)
    tokenizer = {"tokenizer.json": b'{"version": "1.0"}', "tokenizer_config.json": b"{}"}
    write_hf_folder(RandomWeights(spec, 0), spec, tmp_path / "hf", shard_bytes=8000, companions=tokenizer)
    return tmp_path / "hf"


def convert(source, target, *more) -> int:
    return main(["--model", "llama", "--input_path", str(source), "--output_path", str(target), *more])


def equal(left, right) -> bool:
    first, second = open_weights(left), open_weights(right)
    return first.tensors == second.tensors and all(
        first.read(name).tobytes() == second.read(name).tobytes() for name in first.tensors
    )


@pytest.mark.parametrize("concat", [(), ("--qkv_concat", "True"), ("--qkv_concat",), ("--qkv_concat", "False")])
@pytest.mark.parametrize("back", [("--reversed",), ("--reversed", "True")])
def test_there_and_back(folder, tmp_path, capsys, concat, back):
    assert convert(folder, tmp_path / "x.ckpt", *concat) == 0
    assert f"wrote {tmp_path / 'x.ckpt'}: " in capsys.readouterr().out
    joined = b"attention.w_qkv.weight" in (tmp_path / "x.ckpt").read_bytes()
    assert joined == (bool(concat) and concat[-1] != "False")
    assert convert(tmp_path / "x.ckpt", tmp_path / "out", *back, "--config", str(folder)) == 0
    assert equal(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b'{"version": "1.0"}'
    assert convert(tmp_path / "x.ckpt", tmp_path / "out2", *back) == 0  # by x.config.json
    assert equal(folder, tmp_path / "out2")
    assert not (tmp_path / "out2" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "model-00001-of-00012.safetensors"]
)
def test_a_file_in_the_folder_means_the_folder(folder, tmp_path, name):
    assert (folder / name).exists(), sorted(os.listdir(folder))
    assert convert(folder / name, tmp_path / "x.ckpt") == 0
    assert equal(folder, tmp_path / "x.ckpt")


@pytest.mark.parametrize(("word", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_dtype(folder, tmp_path, word, dtype):
    assert convert(folder, tmp_path / "x.ckpt", "--dtype", word) == 0
    assert {info.dtype for info in open_weights(tmp_path / "x.ckpt").tensors.values()} == {dtype}
    assert convert(tmp_path / "x.ckpt", tmp_path / "out", "--reversed") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_the_suffix_is_added_as_mindspore_does(folder, tmp_path):
    assert convert(folder, tmp_path / "deep" / "llama.v2") == 0
    assert sorted(os.listdir(tmp_path / "deep")) == ["llama.v2.ckpt", "llama.v2.config.json"]


def test_shard_size(folder, tmp_path):
    assert convert(folder, tmp_path / "out", "--reversed", "--max_shard_size", "20KB") == 0
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("model-0*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 20_000 + 4000


def test_a_mindformers_recipe_gives_the_sizes(folder, tmp_path):
    """A CKPT from elsewhere comes with MindFormers' YAML, where sizes have MindFormers' names."""
    assert convert(folder, tmp_path / "x.ckpt") == 0
    (tmp_path / "x.config.json").unlink()
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        "model:\n  model_config:\n    type: LlamaConfig\n    hidden_size: 32\n    num_layers: 2\n    num_heads: 4\n"
        "    n_kv_heads: 2\n    vocab_size: 64\n    intermediate_size: 48\n    rms_norm_eps: 1.e-5\n"
    )
    assert convert(tmp_path / "x.ckpt", tmp_path / "out", "--reversed", "--config", str(recipe)) == 0
    assert equal(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["rms_norm_eps"]) == (2, 1e-5)


def test_the_script_works_anywhere_without_installation(folder, tmp_path):
    """A bare Python with numpy and ml_dtypes alone, from another working directory: no framework is needed."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torch", "mindspore", "transformers", "peft", "safetensors"):
        (blocked / f"{name}.py").write_text("raise ImportError('not here')")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", "llama", "--input_path", str(folder), "--output_path", "x.ckpt"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(blocked)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert equal(folder, tmp_path / "x.ckpt")


def damage_norm(folder):
    """Flip one byte in a tensor's shape in a header."""
    file = next(file for file in folder.glob("model-0*") if b"model.norm.weight" in file.read_bytes())
    file.write_bytes(file.read_bytes().replace(b'"shape":[32]', b'"shape":[31]'))


def truncate(folder):
    file = sorted(folder.glob("model-0*"))[3]
    file.write_bytes(file.read_bytes()[:-100])


def escape(folder):
    index = folder / "model.safetensors.index.json"
    shutil.move(folder / "model-00001-of-00012.safetensors", folder.parent)
    index.write_text(index.read_text().replace("model-00001-of", "../model-00001-of"))


def wrong_config(folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_key_value_heads": 4, "num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_norm, ["'model.", "do not fit F32 of shape [31]"]),
        (truncate, ["model-00004-of-00012.safetensors", "truncated"]),
        (escape, ["outside its folder"]),
        (
            wrong_config,
            [
                "'model.layers.2.mlp.up_proj.weight' [48, 32] is missing",
                "'model.layers.0.self_attn.k_proj.weight' has shape [16, 32], but the config says [32, 32]",
            ],
        ),
        (lambda folder: (folder / "config.json").unlink(), ["--config"]),
        (lambda folder: (folder / "config.json").write_text("{nonsense"), ["config.json: cannot be read as JSON"]),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "rwkv"}'),
            ["unknown model family 'rwkv'"],
        ),
        (lambda folder: (folder / "model-00002-of-00012.safetensors").unlink(), ["shard model-00002-of-00012"]),
    ],
)
@pytest.mark.parametrize("back", [False, True])
def test_a_bad_input_is_one_error_and_leaves_nothing(folder, tmp_path, capsys, damage, words, back):
    damage(folder)
    before = sorted(os.listdir(tmp_path))
    assert convert(folder, tmp_path / ("out" if back else "out.ckpt"), *(["--reversed"] if back else [])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error") and "Traceback" not in error
    assert all(word in error for word in words), error
    assert sorted(os.listdir(tmp_path)) == before


def test_a_corrupt_ckpt_is_one_error_and_leaves_nothing(folder, tmp_path, capsys):
    assert convert(folder, tmp_path / "x.ckpt") == 0
    good = (tmp_path / "x.ckpt").read_bytes()
    before = sorted(os.listdir(tmp_path))
    for position in np.linspace(0, len(good) - 1, 60).astype(int):
        (tmp_path / "x.ckpt").write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        capsys.readouterr()
        assert convert(tmp_path / "x.ckpt", tmp_path / "out", "--reversed") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "x.ckpt" in error
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("back", [True, False])
def test_a_large_corrupt_ckpt_that_is_verified_on_the_way_is_one_error_too(folder, tmp_path, capsys, monkeypatch, back):
    """Wherever the damage is: in what is converted, or in what the conversion trips over before it is found."""
    assert convert(folder, tmp_path / "x.ckpt") == 0
    good = (tmp_path / "x.ckpt").read_bytes()
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr("msft.convert.open.SMALL_BYTES", 0)
    words = [tmp_path / "out", "--reversed"] if back else [tmp_path / "y.ckpt"]
    # Not the first bytes, by which a CKPT is told from other files.
    for position in np.linspace(100, len(good) - ckpt.CRC_TAIL - 1, 20).astype(int):
        (tmp_path / "x.ckpt").write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        capsys.readouterr()
        assert convert(tmp_path / "x.ckpt", *words) == 2
        # The progress bar may have begun.
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and error.splitlines()[-1].startswith("error: ")
        assert "x.ckpt: damaged: the content does not fit its CRC-32" in error
        assert "x.ckpt: damaged: the content does not fit its CRC-32" in error
        assert sorted(os.listdir(tmp_path)) == before


def test_a_large_sound_ckpt_is_converted_while_it_is_verified(folder, tmp_path, monkeypatch):
    assert convert(folder, tmp_path / "x.ckpt") == 0
    monkeypatch.setattr("msft.convert.open.SMALL_BYTES", 0)
    assert convert(tmp_path / "x.ckpt", tmp_path / "out", "--reversed") == 0
    assert equal(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "lama"], "--model: unknown model family 'lama', did you mean 'llama'"),
        (["--dtype", "fp8"], "invalid choice"),
        (["--reversed", "perhaps"], "'perhaps' is not a boolean"),
        (["--reversed", "--qkv_concat", "True"], "--qkv_concat is for CKPT files"),
        (["--qkv_conact"], "unrecognized arguments: --qkv_conact, did you mean '--qkv_concat'"),
        (["--reversed"], "looks like a file"),
        (["--output_path", "."], "is a folder; name the CKPT to write"),
        (["--max_shard_size", "many"], "--max_shard_size: 'many' is no size"),
        (["--input_path", "nowhere"], "nowhere: does not exist"),
    ],
)
def test_wrong_words_are_explained(folder, tmp_path, capsys, words, message):
    by_argparse = any(start in message for start in ("invalid choice", "not a boolean", "unrecognized"))
    with pytest.raises(SystemExit, match="2") if by_argparse else nullcontext():
        assert convert(folder, tmp_path / "x.ckpt", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.ckpt").exists()


def test_help_needs_no_numpy():
    code = (
        "import sys; from msft.cli import convert_weight, merge; convert_weight.parser(); merge.parser(); "
        "print('numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "False", result.stderr


@pytest.mark.parametrize(("name", "is_said"), [("gpt2", True), ("mixtral", False)])
def test_joined_tensors_that_a_family_does_not_have_are_said_to_have_no_effect(name, is_said, tmp_path, capsys):
    from tests.conformance.families import CONFIGS

    spec = spec_from_hf(CONFIGS[name])
    write_hf_folder(RandomWeights(spec, 0), spec, tmp_path / "hf", bar=False)
    words = ["--model", name, "--input_path", str(tmp_path / "hf"), "--output_path", str(tmp_path / "x.ckpt")]
    assert main([*words, "--qkv_concat"]) == 0
    assert ("--qkv_concat has no effect" in "".join(capsys.readouterr())) == is_said
