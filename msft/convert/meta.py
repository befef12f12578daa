"""Meta's own Llama format: `consolidated.NN.pth`, one per model-parallel rank, and `params.json`.

Format: https://github.com/meta-llama/llama. Query and key rows are in rotary pairs and are put into
Hugging Face's order.
"""

import re
from pathlib import Path

import numpy as np

from msft.convert import torch_file
from msft.convert.check import is_buffer
from msft.convert.dtypes import numpy_dtype
from msft.convert.hf_folder import read_json
from msft.convert.rotary import pairs_to_halves
from msft.convert.source import TensorInfo
from msft.convert.stored import Stored, StoredTensors
from msft.errors import InputError

# Meta's name -> (Hugging Face's, the axis that model-parallel ranks share out; None = every rank has it whole).
_LAYER = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
_MODEL = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 1),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}


class MetaTensors:
    """A TensorSource over the ranks' files; a tensor is put together when it is read."""

    def __init__(self, folder: Path, verify: bool = True):
        self.params = _params(folder)
        self.files = sorted(folder.glob("consolidated.*.pth"))
        self.ranks = [StoredTensors(torch_file.read_index(file, verify)) for file in self.files]
        self.names: dict[str, tuple[str, int | None]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, entry in self.ranks[0].stored.items():
            if not is_buffer(name):
                self._add(name, entry)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in Hugging Face's layout."""
        source, axis = self.names[name]
        info = self.tensors[name]
        if axis is None:
            return self.ranks[0].read(source)
        whole = np.empty(info.shape, numpy_dtype(info.dtype))
        start = 0
        for rank in self.ranks:
            part = rank.read(source)
            stop = start + part.shape[axis]
            whole[(slice(None),) * axis + (slice(start, stop),)] = part
            start = stop
        heads = self._heads(source)
        return pairs_to_halves(whole, heads) if heads else whole

    def file_of(self, name: str) -> str:
        """Return the first rank's file that holds a part of a tensor."""
        return self.ranks[0].file_of(self.names[name][0])

    def _heads(self, name: str) -> int | None:
        """The number of heads whose rows are in rotary pairs, None for other tensors."""
        heads = {"attention.wq.weight": self.params["n_heads"], "attention.wk.weight": self.params["n_kv_heads"]}
        return heads.get(name.split(".", 2)[-1])

    def _add(self, name: str, first: Stored) -> None:
        parts = [rank.stored.get(name) for rank in self.ranks]
        missing = [file for file, part in zip(self.files, parts, strict=True) if part is None]
        if missing:
            raise InputError(*(f"{file}: tensor {name!r} is missing" for file in missing))
        new_name, axis = _hugging_face(name, first)
        if name == "tok_embeddings.weight" and first.info.shape[1:] == (self.params["dim"],):
            # Llama 3 shares the embedding out by vocabulary, Llama 1 and 2 by width.
            axis = 0
        self.names[new_name] = (name, axis)
        self.tensors[new_name] = info = _joined([part.info for part in parts], axis, f"{first.file}: tensor {name!r}")
        heads = self._heads(name)
        if heads and info.shape[0] % (2 * heads):
            raise InputError(f"{first.file}: tensor {name!r} has {info.shape[0]} rows, no pairs for {heads} heads")


def open_folder(folder: Path) -> MetaTensors:
    """Open Meta's folder under Hugging Face's names."""
    return MetaTensors(folder)


def hf_config(folder: Path) -> dict:
    """Return the Hugging Face config of Meta's folder, from params.json and the tensors' shapes.

    What params.json leaves open is taken from the model generation that its rope settings and vocabulary show.
    """
    source = MetaTensors(folder, verify=False)
    params = source.params
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight", "model.norm.weight"):
        if name not in source.tensors:
            raise InputError(f"{source.files[0]}: the tensor for {name!r} is missing")
    vocabulary = source.tensors["model.embed_tokens.weight"].shape[0]
    third = vocabulary == 128256
    scaling = {
        "rope_type": "llama3",
        # Llama 3.2 (1B: width 2048, 3B: 3072) stretches by 32, Llama 3.1 by 8.
        "factor": 32.0 if params["dim"] in (2048, 3072) else 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = bool(params.get("use_scaled_rope"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": params["dim"],
        "intermediate_size": source.tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 10000.0),
        "rope_scaling": scaling if scaled else None,
        "max_position_embeddings": 131072 if scaled else 8192 if third else 4096,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 128000 if third else 1,
        "eos_token_id": 128001 if third else 2,
        "torch_dtype": source.tensors["model.norm.weight"].dtype,
    }


def _params(folder: Path) -> dict:
    params = read_json(folder / "params.json")
    params.setdefault("n_kv_heads", params.get("n_heads"))
    bad = [
        key
        for key in ("dim", "n_layers", "n_heads", "n_kv_heads")
        if type(params.get(key)) is not int or params[key] < 1
    ]
    if bad:
        raise InputError(
            *(
                f"{folder / 'params.json'}: {key!r} must be a whole number above 0, not {params.get(key)!r}"
                for key in bad
            )
        )
    return params


def _hugging_face(name: str, entry: Stored) -> tuple[str, int | None]:
    if name in _MODEL:
        return _MODEL[name]
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if layer and layer[2] in _LAYER:
        leaf, axis = _LAYER[layer[2]]
        return f"model.layers.{layer[1]}.{leaf}", axis
    raise InputError(f"{entry.file}: unexpected tensor {name!r}; no Llama in Meta's format")


def _joined(infos: list[TensorInfo], axis: int | None, where: str) -> TensorInfo:
    first = infos[0]
    if axis is None:
        return first
    for info in infos:
        rest = [size for index, size in enumerate(info.shape) if index != axis]
        if info.dtype != first.dtype or len(info.shape) != 2 or rest != [first.shape[1 - axis]]:
            raise InputError(f"{where}: the ranks' parts do not fit together ({list(info.shape)}, {list(first.shape)})")
    shape = list(first.shape)
    shape[axis] = sum(info.shape[axis] for info in infos)
    return TensorInfo(tuple(shape), first.dtype)
