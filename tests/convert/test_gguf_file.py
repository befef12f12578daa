"""GGUF: weights and config of files written by the gguf package, de-quantised and in Hugging Face's row order."""

import json
import sys

import gguf
import numpy as np
import pytest
import torch

from msft.convert.check import check_against
from msft.convert.open import open_weights, read_hf_config, read_spec
from msft.errors import InputError

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's permutation in convert_hf_to_gguf.py."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, expected, architecture="llama", kind=None, extra=None, metadata=None):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for add in metadata or ():
        add(writer)
    for name, array in {**expected, **(extra or {})}.items():
        if "q_proj" in name or "k_proj" in name:
            array = pairs(array, 4 if "q_proj" in name else 2)
        array = np.ascontiguousarray(array)
        if kind is not None and array.ndim == 2 and array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(gguf_name(name), gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_plain_tensors_are_equal(tmp_path, expected, spec, same_bits):
    path = write_gguf(tmp_path / "x.gguf", expected)
    for place in (path, tmp_path):
        source = open_weights(place)
        check_against(spec, source)
        assert all(same_bits(source.read(name), array) for name, array in expected.items())
    read = read_spec(path)
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_ids",
        "vocab_size",
    ):
        assert getattr(read, key) == getattr(spec, key), key


@pytest.mark.parametrize(
    "kind",
    [
        gguf.GGMLQuantizationType.Q8_0,
        gguf.GGMLQuantizationType.Q4_1,
        gguf.GGMLQuantizationType.BF16,
        gguf.GGMLQuantizationType.F16,
    ],
)
def test_quantised_tensors_equal_transformers(tmp_path, expected, kind):
    """transformers loads the same file: its weights, row order included, are the oracle."""
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "x.gguf", expected, kind=kind, metadata=[VOCABULARY])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    source = open_weights(tmp_path / "x.gguf")
    wanted = {"BF16": "bfloat16", "F16": "float16"}.get(kind.name, "float32")
    assert source.tensors["lm_head.weight"].dtype == wanted
    for name, tensor in model.state_dict().items():
        assert np.array_equal(source.read(name).astype(np.float32), tensor.numpy()), name


def VOCABULARY(writer):  # noqa: N802
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(0x100 + index) for index in range(95)] + ["\u0100\u0101"])
    writer.add_token_merges(["\u0100 \u0101"])


def test_a_tied_model_and_llama_3_rotary_factors(tmp_path, expected):
    """llama.cpp stores Llama 3's scaling as factors; transformers' own formula made these."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=scaling
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(64) / 64)
    tensors = {name: array for name, array in expected.items() if name != "lm_head.weight"}
    path = write_gguf(
        tmp_path / "x.gguf",
        tensors,
        extra={"rope_freqs.weight": (plain / scaled).float().numpy()},
        metadata=[lambda writer: writer.add_float32("llama.rope.freq_base", 500000.0)],
    )
    read = read_hf_config(path)
    assert read["tie_word_embeddings"] is True
    assert read["rope_scaling"] == {key: value for key, value in scaling.items() if key != "rope_theta"}
    other = write_gguf(
        tmp_path / "y.gguf", tensors, extra={"rope_freqs.weight": np.linspace(1, 9, 64, dtype=np.float32)}
    )
    with pytest.raises(InputError, match="y.gguf: its rotary factors"):
        read_hf_config(other)


def test_linear_scaling(tmp_path, expected):
    def scale(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    path = write_gguf(tmp_path / "x.gguf", expected, metadata=[scale])
    assert read_spec(path).rope_scaling == {"rope_type": "linear", "factor": 4.0}


def test_faults_are_named(tmp_path, expected):
    with pytest.raises(InputError, match="architecture 'gemma' is not supported"):
        open_weights(write_gguf(tmp_path / "a.gguf", expected, architecture="gemma"))
    with pytest.raises(InputError, match="b.gguf: unexpected tensor 'blk.0.ssm_a.weight'"):
        open_weights(write_gguf(tmp_path / "b.gguf", expected, extra={"blk.0.ssm_a.weight": np.ones(3, np.float32)}))
    data = write_gguf(tmp_path / "c.gguf", expected).read_bytes()
    for length in list(range(4, 2000, 37)) + [len(data) // 2, len(data) - 1]:
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(InputError, match="cut.gguf"):
            open_weights(tmp_path / "cut.gguf")


def test_rotary_factors_are_inside_the_file(tmp_path, expected):
    """Their size decides how much memory is taken, before anything is read."""
    path = write_gguf(tmp_path / "x.gguf", expected, extra={"rope_freqs.weight": np.ones(4, np.float32)})
    data = bytearray(path.read_bytes())
    size = data.index(b"rope_freqs.weight") + len("rope_freqs.weight") + 4
    data[size : size + 8] = (2**40).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match="x.gguf: tensor 'rope_freqs.weight' reaches beyond the end of the file"):
        read_spec(path)


def test_heads_that_do_not_fit_the_rows_are_named(tmp_path, expected):
    data = bytearray(write_gguf(tmp_path / "x.gguf", expected).read_bytes())
    at = data.index(b"llama.attention.head_count") + len("llama.attention.head_count") + 4
    data[at : at + 4] = (32).to_bytes(4, "little")
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(InputError, match="x.gguf: .*q_proj.weight' has 32 rows, no pairs for 32 heads"):
        open_weights(tmp_path / "x.gguf").read("model.layers.0.self_attn.q_proj.weight")


def test_only_quantised_files_need_the_gguf_package(tmp_path, expected, monkeypatch):
    plain = write_gguf(tmp_path / "plain.gguf", expected)
    quantised = write_gguf(tmp_path / "q8.gguf", expected, kind=gguf.GGMLQuantizationType.Q8_0)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert open_weights(plain).read("model.norm.weight").shape == (32,)
    with pytest.raises(InputError, match="q8.gguf.*is quantised, and reading that needs the gguf package: pip install"):
        open_weights(quantised)


def test_a_part_of_a_split_file_is_said(tmp_path, expected):
    path = write_gguf(tmp_path / "x.gguf", expected, metadata=[lambda writer: writer.add_uint16("split.count", 3)])
    with pytest.raises(InputError, match="x.gguf: is one of 3 parts"):
        open_weights(path)


def test_the_command_writes_a_folder_that_transformers_loads(tmp_path, expected, model):
    from msft.cli.convert_weight import main

    path = write_gguf(tmp_path / "x.gguf", expected, metadata=[VOCABULARY])
    arguments = ["--model", "llama", "--input_path", str(path), "--output_path", str(tmp_path / "out"), "--reversed"]
    assert main(arguments) == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 96
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
