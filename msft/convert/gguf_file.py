"""GGUF files (llama.cpp's format) as a source of weights; needs the `gguf` package.

Quantised tensors become float32; query and key rows go from rotary pairs to Hugging Face's halves.
"""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from msft.convert.dtypes import numpy_dtype
from msft.convert.rotary import pairs_to_halves
from msft.convert.source import TensorInfo
from msft.errors import InputError

_LEAVES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PLAIN = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ROPE_FACTORS = "rope_freqs.weight"


class GgufTensors:
    """A TensorSource over a GGUF file under Hugging Face's names."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata = read_metadata(path)
        self._entries = {
            _hugging_face(path, tensor.name): tensor for tensor in _reader(path).tensors if tensor.name != ROPE_FACTORS
        }
        self.tensors = {
            name: TensorInfo(
                tuple(int(size) for size in tensor.shape[::-1]), _PLAIN.get(tensor.tensor_type.name, "float32")
            )
            for name, tensor in self._entries.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, de-quantised, in Hugging Face's layout."""
        import gguf

        tensor, info = self._entries[name], self.tensors[name]
        if tensor.tensor_type.name in _PLAIN:
            array = np.ascontiguousarray(tensor.data).reshape(-1).view(numpy_dtype(info.dtype)).reshape(info.shape)
        else:
            array = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(info.shape)
        heads = {"q_proj": "attention.head_count", "k_proj": "attention.head_count_kv"}.get(name.split(".")[-2])
        return pairs_to_halves(array, self._heads(heads)) if heads else np.array(array)

    def file_of(self, name: str) -> str:
        """Return the path of the file."""
        return str(self.path)

    def _heads(self, key: str) -> int:
        return int(self.metadata.get(f"llama.{key}", self.metadata.get("llama.attention.head_count")))


def open_file(path: Path) -> GgufTensors:
    """Open a GGUF file; raises InputError for other architectures than llama and for damaged files."""
    return GgufTensors(path)


def read_metadata(path: Path) -> dict:
    """Return a GGUF file's metadata as plain Python values; raises InputError unless it is a dense Llama."""
    metadata = {name: field.contents() for name, field in _reader(path).fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture != "llama" or metadata.get("llama.expert_count"):
        kind = "llama with experts" if architecture == "llama" else repr(architecture)
        raise InputError(f"{path}: GGUF of architecture {kind} is not supported (known: llama)")
    keys = ("llama.embedding_length", "llama.block_count", "llama.feed_forward_length", "llama.attention.head_count")
    missing = [key for key in keys if not isinstance(metadata.get(key), int) or metadata[key] < 1]
    if missing:
        raise InputError(*(f"{path}: GGUF metadata {key!r} is missing or impossible" for key in missing))
    return metadata


def hf_config(path: Path) -> dict:
    """Return the Hugging Face config that a GGUF file's metadata describes."""
    source = open_file(path)
    get = source.metadata.get
    heads, width = get("llama.attention.head_count"), get("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": source.tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("llama.attention.head_count_kv", heads),
        "head_dim": get("llama.attention.key_length") or get("llama.rope.dimension_count") or width // heads,
        "rms_norm_eps": _short(get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": _short(get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(path, source.metadata),
        "max_position_embeddings": get("llama.context_length", 2048),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in source.tensors,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in source.tensors,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in source.tensors,
        "initializer_range": 0.02,
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF stores 1e-05 as 9.99999974e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(path: Path, metadata: dict) -> dict | None:
    factors = next((tensor for tensor in _reader(path).tensors if tensor.name == ROPE_FACTORS), None)
    if factors is not None:
        return _llama3_scaling(path, metadata, np.asarray(factors.data, np.float32).reshape(-1))
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _short(metadata.get("llama.rope.scaling.factor", 1.0))}
    original = metadata.get("llama.rope.scaling.original_context_length")
    return scaling | ({"original_max_position_embeddings": original} if original else {})


def _llama3_scaling(path: Path, metadata: dict, factors: np.ndarray) -> dict:
    """Find the Llama 3 scaling that gives these factors, since GGUF keeps only the result."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(f"{factors.max():.6g}"),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = float(metadata.get("llama.rope.freq_base", 10000.0))
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    smooth = np.clip((8192 / wavelengths - 1.0) / 3.0, 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise InputError(
            f"{path}: its rotary factors ({ROPE_FACTORS}) are not those of Llama 3, which is not supported"
        )
    return scaling


def _hugging_face(path: Path, name: str) -> str:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in _LEAVES:
        return f"model.layers.{block[1]}.{_LEAVES[block[2]]}.{block[3]}"
    if name in _MODEL:
        return _MODEL[name]
    raise InputError(f"{path}: unexpected tensor {name!r}")


def _reader(path: Path):
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return _read(path, status.st_mtime_ns, status.st_size)


# Reading the vocabulary takes a second, and config, weights and tokenizer all ask for it.
@lru_cache(maxsize=1)
def _read(path: Path, _modified: int, _size: int):
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(
            f"{path}: reading GGUF needs the gguf package: pip install 'msft[demo]' or pip install gguf"
        ) from None
    try:
        return GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, OSError) as error:
        raise InputError(f"{path}: no GGUF file, or truncated or damaged: {error}") from error
