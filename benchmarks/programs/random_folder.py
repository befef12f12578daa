"""Writes a Hugging Face folder with random float16 weights of Llama 2 7B's shapes, holding one block in memory.

usage: random_folder.py FOLDER LAYERS
"""

import json
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from msft.convert.safetensors_file import SafetensorsWriter
from msft.convert.source import TensorInfo
from msft.models.families import spec_from_hf
from msft.models.shapes import tensor_shapes

BLOCK, SHARD = 1 << 26, 4 << 30
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
}


def largest_tensor() -> int:
    """Return the bytes of the largest tensor."""
    return max(map(size, shapes(1).values()))


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the model's tensors with so many blocks."""
    spec = spec_from_hf(CONFIG | {"num_hidden_layers": layers})
    return tensor_shapes(spec)


def size(shape: tuple[int, ...]) -> int:
    """Return the bytes of a float16 tensor."""
    return 2 * prod(shape)


def write(folder: Path, layers: int) -> None:
    """Write config, shards and index; the bytes are random, different in every tensor, and no NaN."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    generator = np.random.default_rng(0)
    block = generator.standard_normal(BLOCK // 2, np.float32).astype(np.float16).view(np.uint8)
    shards = list(split(shapes(layers)))
    places = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(tensors, name)
        with open(folder / name, "wb") as file:
            writer = SafetensorsWriter(file, {name: TensorInfo(shape, "float16") for name, shape in tensors.items()})
            for tensor, shape in tensors.items():
                writer.add(tensor, pieces(block, size(shape), 2 * int(generator.integers(BLOCK // 2))))
            writer.close()
    index = {"metadata": {"total_size": sum(map(size, shapes(layers).values()))}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def split(tensors: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of each shard."""
    shard = {}
    for name, shape in tensors.items():
        if shard and sum(map(size, shard.values())) + size(shape) > SHARD:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def pieces(block: np.ndarray, total: int, start: int) -> Iterator[np.ndarray]:
    """Yield `total` bytes of the block, over and over, beginning at `start`."""
    while total:
        piece = block[start : start + total]
        yield piece
        total, start = total - len(piece), 0


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
