"""GGUF files (llama.cpp's format) as a source of weights.

Quantised tensors become float32, which needs the `gguf` package; query and key rows go from rotary pairs to
Hugging Face's halves.
"""

import math
import re
from pathlib import Path

import numpy as np

from msft.convert.dtypes import PIECE_BYTES, byte_count
from msft.convert.gguf_header import GgufHeader, GgufTensor, read_header
from msft.convert.rotary import pairs_to_halves
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored, StoredTensors
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
# GGML's type numbers of what is not quantised.
_PLAIN = {0: "float32", 1: "float16", 28: "float64", 30: "bfloat16"}
ROPE_FACTORS = "rope_freqs.weight"


class GgufTensors:
    """A TensorSource over a GGUF file under Hugging Face's names.

    Raises InputError for other architectures than a dense Llama, unknown tensors, and damaged files.
    """

    def __init__(self, path: Path):
        self.path = path
        header = _read_llama(path)
        self.metadata = header.metadata
        self.rope_factors = header.tensors.get(ROPE_FACTORS)
        self._stored: dict[str, Stored] = {}
        self._kinds: dict[str, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, tensor in header.tensors.items():
            if name != ROPE_FACTORS:
                self._add(_hugging_face(path, name), name, tensor)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, de-quantised, in Hugging Face's layout."""
        array = StoredTensors(self._stored).read(name)
        if name in self._kinds:
            array = _dequantize(array, self._kinds[name]).reshape(self.tensors[name].shape)
        key = {"q_proj": "attention.head_count", "k_proj": "attention.head_count_kv"}.get(name.split(".")[-2])
        if key is None:
            return array
        heads = self._heads(key)
        rows = array.shape[0] if array.shape else 0
        if not 0 < heads <= rows or rows % (2 * heads):
            raise InputError(f"{self.path}: {name!r} has {rows} rows, no pairs for {heads} heads (llama.{key})")
        return pairs_to_halves(array, heads)

    def file_of(self, name: str) -> str:
        """Return the path of the file."""
        return str(self.path)

    def _add(self, name: str, gguf_name: str, tensor: GgufTensor) -> None:
        where = f"{self.path}: tensor {gguf_name!r}"
        if tensor.kind in _PLAIN:
            info = stored_info = TensorInfo(tensor.shape, _PLAIN[tensor.kind])
        else:
            info = TensorInfo(tensor.shape, "float32")
            stored_info = TensorInfo(_quantised_shape(tensor, where), "uint8")
            self._kinds[name] = tensor.kind
        size = byte_count(stored_info)
        if tensor.offset + size > self.path.stat().st_size:
            raise InputError(f"{where}: reaches beyond the end of the file; truncated or damaged")
        self._stored[name] = Stored(stored_info, self.path, ((tensor.offset, size),))
        self.tensors[name] = info

    def _heads(self, key: str) -> int:
        value = self.metadata.get(f"llama.{key}", self.metadata["llama.attention.head_count"])
        return value if isinstance(value, int) else 0


def open_file(path: Path) -> GgufTensors:
    """Open a GGUF file under Hugging Face's names."""
    return GgufTensors(path)


def read_metadata(path: Path) -> dict:
    """Return the metadata of a Llama in GGUF, arrays as lists; raises InputError for other models."""
    return _read_llama(path).metadata


def _read_llama(path: Path) -> GgufHeader:
    header = read_header(path)
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama" or metadata.get("llama.expert_count"):
        kind = "llama with experts" if architecture == "llama" else repr(architecture)
        raise InputError(f"{path}: GGUF of architecture {kind} is not supported (known: llama)")
    if metadata.get("split.count", 1) != 1:
        raise InputError(f"{path}: is one of {metadata['split.count']} parts; join them with llama-gguf-split --merge")
    keys = ("llama.embedding_length", "llama.block_count", "llama.feed_forward_length", "llama.attention.head_count")
    missing = [key for key in keys if not isinstance(metadata.get(key), int) or metadata[key] < 1]
    if missing:
        raise InputError(*(f"{path}: GGUF metadata {key!r} is missing or impossible" for key in missing))
    return header


def _quantised_shape(tensor: GgufTensor, where: str) -> tuple[int, int]:
    """Rows and bytes a row of a quantised tensor."""
    gguf = _gguf(where)
    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
    except (ValueError, KeyError):
        raise InputError(f"{where}: unknown GGML type {tensor.kind}") from None
    if not tensor.shape or tensor.shape[-1] % block:
        raise InputError(f"{where}: rows of shape {list(tensor.shape)} are no multiple of {block}; damaged")
    return math.prod(tensor.shape[:-1]), tensor.shape[-1] // block * block_bytes


def _dequantize(array: np.ndarray, kind: int) -> np.ndarray:
    gguf = _gguf("dequantize")
    kind = gguf.GGMLQuantizationType(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    result = np.empty((len(array), array.shape[1] // block_bytes * block), np.float32)
    step = max(1, PIECE_BYTES // (result.shape[1] * 4))
    for start in range(0, len(array), step):
        try:
            result[start : start + step] = gguf.dequantize(array[start : start + step], kind)
        except NotImplementedError as error:
            raise InputError(f"GGML type {kind.name} cannot be read by the gguf package: {error}") from error
    return result


def _gguf(where: str):
    try:
        import gguf
    except ImportError:
        needed = "pip install 'msft[demo]' or pip install gguf"
        raise InputError(f"{where}: is quantised, and reading that needs the gguf package: {needed}") from None
    return gguf


def hf_config(path: Path) -> dict:
    """Return the Hugging Face config that a GGUF file's metadata describes."""
    source = open_file(path)
    if "model.embed_tokens.weight" not in source.tensors:
        raise InputError(f"{path}: tensor 'token_embd.weight' is missing")
    try:
        return _config(source)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: its metadata is damaged: {error}") from error


def _config(source: GgufTensors) -> dict:
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
        "rope_scaling": _rope_scaling(source),
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


def _rope_scaling(source: GgufTensors) -> dict | None:
    metadata, factors = source.metadata, source.rope_factors
    if factors is not None:
        if _PLAIN.get(factors.kind) != "float32":
            raise InputError(f"{source.path}: tensor {ROPE_FACTORS!r} is not float32; damaged")
        info = TensorInfo(factors.shape, "float32")
        if factors.offset + byte_count(info) > source.path.stat().st_size:
            raise InputError(f"{source.path}: tensor {ROPE_FACTORS!r} reaches beyond the end of the file; damaged")
        stored = Stored(info, source.path, ((factors.offset, byte_count(info)),))
        return _llama3_scaling(source.path, metadata, StoredTensors({ROPE_FACTORS: stored}).read(ROPE_FACTORS))
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
