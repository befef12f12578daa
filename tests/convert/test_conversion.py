"""Conversion keeps every bit, casts as asked, joins what it should, and leaves nothing half-done."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch

from msft.convert.check import check_against
from msft.convert.dtypes import Cast
from msft.convert.open import open_weights, read_spec
from msft.convert.weights import shards, write_ckpt, write_hf_folder
from msft.errors import InputError, RunError
from msft.models.shapes import tensor_shapes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def awkward(shape, dtype, seed=0) -> np.ndarray:
    """Every bit pattern may occur: NaN payloads, infinities, subnormal numbers, negative zero."""
    width = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}[dtype]
    bits = np.random.default_rng(seed).integers(0, np.iinfo(width).max, shape, width, endpoint=True)
    return bits.view(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def awkward_folder(tmp_path, spec, config, dtype):
    from msft.convert.dtypes import byte_count
    from msft.convert.safetensors_file import SafetensorsWriter
    from msft.convert.source import TensorInfo

    folder = tmp_path / "in"
    folder.mkdir()
    arrays = {name: awkward(shape, dtype, seed) for seed, (name, shape) in enumerate(tensor_shapes(spec).items())}
    infos = {name: TensorInfo(array.shape, dtype) for name, array in arrays.items()}
    assert all(byte_count(infos[name]) == array.nbytes for name, array in arrays.items())
    with open(folder / "model.safetensors", "wb") as file:
        writer = SafetensorsWriter(file, infos)
        for name, array in arrays.items():
            writer.add(name, [array.reshape(-1).view(np.uint8)])
    (folder / "config.json").write_text(json.dumps(config))
    return folder, arrays


@pytest.mark.parametrize("qkv_concat", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_is_bit_equal(tmp_path, spec, config, same_bits, dtype, qkv_concat):
    folder, arrays = awkward_folder(tmp_path, spec, config, dtype)
    write_ckpt(open_weights(folder), spec, tmp_path / "x.ckpt", qkv_concat=qkv_concat)
    source = open_weights(tmp_path / "x.ckpt")
    check_against(spec, source)
    write_hf_folder(source, read_spec(tmp_path / "x.ckpt"), tmp_path / "out", shard_bytes=10_000)
    assert len(list((tmp_path / "out").glob("model-0*.safetensors"))) > 1
    back = open_weights(tmp_path / "out")
    assert set(back.tensors) == set(arrays)
    for name, array in arrays.items():
        assert same_bits(back.read(name), array), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, "torch_dtype": dtype}


def test_transformers_gives_the_same_logits_after_the_round_trip(tmp_path, hf_folder, model, spec):
    from transformers import LlamaForCausalLM

    write_ckpt(open_weights(hf_folder), spec, tmp_path / "x.ckpt", qkv_concat=True)
    write_hf_folder(
        open_weights(tmp_path / "x.ckpt"), read_spec(tmp_path / "x.ckpt"), tmp_path / "out", shard_bytes=9000
    )
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.dtype == torch.float32


@pytest.mark.parametrize("qkv_concat", [False, True])
def test_the_ckpt_holds_mindformers_names(tmp_path, hf_folder, spec, expected, qkv_concat):
    import mindspore

    write_ckpt(open_weights(hf_folder), spec, tmp_path / "x.ckpt", qkv_concat=qkv_concat)
    params = {name: value.asnumpy() for name, value in mindspore.load_checkpoint(str(tmp_path / "x.ckpt")).items()}
    layer = "model.layers.1"
    assert np.array_equal(params["model.tok_embeddings.embedding_weight"], expected["model.embed_tokens.weight"])
    assert np.array_equal(params["model.norm_out.weight"], expected["model.norm.weight"])
    q, k, v, gate, up = (
        expected[f"{layer}.{name}.weight"]
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    )
    if qkv_concat:
        assert len(params) == 3 + 2 * 6
        assert np.array_equal(params[f"{layer}.attention.w_qkv.weight"], np.concatenate([q, k, v]))
        assert np.array_equal(params[f"{layer}.feed_forward.w_gate_hidden.weight"], np.concatenate([gate, up]))
    else:
        assert len(params) == 3 + 2 * 9
        assert np.array_equal(params[f"{layer}.attention.wk.weight"], k)
        assert np.array_equal(params[f"{layer}.feed_forward.w3.weight"], up)


def test_biases_are_joined_too(tmp_path, config, same_bits):
    from msft.convert.random_weights import RandomWeights
    from msft.models.families import spec_from_hf

    spec = spec_from_hf({**config, "attention_bias": True})
    source = RandomWeights(spec, 0)
    write_ckpt(source, spec, tmp_path / "x.ckpt", qkv_concat=True)
    from msft.convert.ckpt import read_index

    assert read_index(tmp_path / "x.ckpt").tensors["model.layers.0.attention.w_qkv.bias"].info.shape == (64,)
    back = open_weights(tmp_path / "x.ckpt")
    check_against(spec, back)
    assert all(same_bits(back.read(name), source.read(name)) for name in source.tensors)


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("origin", DTYPES)
def test_casts_round_as_torch_does(origin, target, monkeypatch):
    """Rounding to nearest even in all nine directions, in pieces, NaN staying NaN."""
    from msft.convert import dtypes

    monkeypatch.setattr(dtypes, "PIECE_BYTES", 4096)
    array = awkward((64, 50), origin)
    if origin == "float32":
        array[0, 0] = 3.4e38  # finite, but beyond bfloat16's largest number
    theirs = torch.from_numpy(array.view(np.int32 if origin == "float32" else np.int16)).view(DTYPES[origin])
    theirs = theirs.to(DTYPES[target]).contiguous()
    cast = Cast(target)
    parts = list(cast.pieces("w", array))
    assert len(parts) > 1
    ours = np.concatenate(parts).view(dtypes.numpy_dtype(target)).reshape(array.shape)
    bits = theirs.view(torch.int32 if target == "float32" else torch.int16).numpy()
    nan = np.isnan(ours.astype(np.float32))
    assert np.array_equal(nan, torch.isnan(theirs).numpy())
    assert np.array_equal(ours.view(bits.dtype)[~nan], bits[~nan])
    finite = np.isfinite(array.astype(np.float32))
    assert cast.overflows.get("w", 0) == int((np.isinf(ours.astype(np.float32)) & finite).sum())
    assert bool(cast.overflows) == (
        (origin, target) in {("float32", "float16"), ("bfloat16", "float16"), ("float32", "bfloat16")}
    )


def test_overflow_is_reported(tmp_path, expected, write_folder, spec, capsys):
    tensors = {name: array.copy() for name, array in expected.items()}
    tensors["model.norm.weight"][:3] = [1e5, -7e4, 65504]
    write_ckpt(open_weights(write_folder(tensors)), spec, tmp_path / "x.ckpt", "float16")
    report = capsys.readouterr().err
    assert (
        "2 numbers in 1 tensors are too large for float16 and became infinite (most in model.norm.weight: 2)" in report
    )
    assert json.loads((tmp_path / "x.config.json").read_text())["torch_dtype"] == "float16"


def test_integers_are_never_cast():
    array = np.array([300, 2**40])
    assert np.concatenate(list(Cast("float16").pieces("n", array))).tobytes() == array.tobytes()


def test_strided_tensors_are_written_in_c_order():
    array = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2]
    assert np.concatenate(list(Cast(None).pieces("w", array))).tobytes() == np.ascontiguousarray(array).tobytes()


def test_mixed_dtypes_cannot_be_joined_unless_cast(tmp_path, expected, write_folder, spec):
    tensors = {**expected, "model.layers.0.self_attn.k_proj.weight": np.ones((16, 32), np.float16)}
    source = open_weights(write_folder(tensors))
    with pytest.raises(InputError, match="cannot be joined, they are float16 and float32; give --dtype"):
        write_ckpt(source, spec, tmp_path / "x.ckpt", qkv_concat=True)
    write_ckpt(source, spec, tmp_path / "x.ckpt", "bfloat16", qkv_concat=True)


def test_shards_respect_their_size(hf_folder, spec):
    from msft.convert.dtypes import byte_count
    from msft.convert.plan import plan

    outputs = plan(spec, open_weights(hf_folder), Cast(None), mindformers=False)
    parts = shards(outputs, 7000)
    assert [output for part in parts for output in part] == outputs
    sizes = [sum(byte_count(output.info) for output in part) for part in parts]
    assert all(size <= 7000 or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    assert max(sizes) == 96 * 32 * 4 and len(parts) < len(outputs)


def test_generation_config_and_companions(tmp_path, hf_folder, spec):
    (tmp_path / "tokenizer.json").write_text("{}")
    companions = {"tokenizer.json": tmp_path / "tokenizer.json", "chat_template.jinja": b"hi"}
    write_hf_folder(open_weights(hf_folder), spec, tmp_path / "out", companions=companions)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Failing:
    """A source whose last tensor cannot be read."""

    def __init__(self, source):
        self.source, self.tensors, self.file_of = source, source.tensors, source.file_of

    def read(self, name):
        if name == "lm_head.weight":
            raise InputError("lm_head.weight is damaged")
        return self.source.read(name)


def test_a_failure_leaves_the_old_file_and_no_new_one(tmp_path, hf_folder, spec):
    source = Failing(open_weights(hf_folder))
    (tmp_path / "x.ckpt").write_bytes(b"old")
    with pytest.raises(InputError, match="is damaged"):
        write_ckpt(source, spec, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="is damaged"):
        write_hf_folder(source, spec, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"] and (tmp_path / "x.ckpt").read_bytes() == b"old"


def test_an_existing_folder_is_not_overwritten(tmp_path, hf_folder, spec):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="full: exists"):
        write_hf_folder(open_weights(hf_folder), spec, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    write_hf_folder(open_weights(hf_folder), spec, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_a_full_disk_is_one_error(tmp_path, hf_folder, spec, monkeypatch):
    import errno

    from msft.convert.ckpt import CkptWriter

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CkptWriter, "_write", full)
    with pytest.raises(RunError, match="x.ckpt: cannot be written: No space left on device"):
        write_ckpt(open_weights(hf_folder), spec, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []
