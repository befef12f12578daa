"""Converting 2 GB takes no more memory than the largest tensor plus 300 MB, in both directions."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from msft.convert import safetensors_file
from msft.convert.open import open_weights
from msft.convert.source import TensorInfo
from msft.models.families import spec_from_hf
from msft.models.shapes import tensor_shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 72000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
LARGEST = 72000 * 2048 * 4  # over CKPT's 512 MiB slices

# VmHWM, not getrusage: the latter counts what the parent had before exec.
RUN = """
import re, sys
from msft.cli.convert_weight import main
code = main(sys.argv[1:])
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path):
    """Shards whose tensors are holes in the file but for a stripe at both ends, so that making them costs nothing."""
    shards: dict[int, dict[str, TensorInfo]] = {}
    for name, shape in tensor_shapes(spec_from_hf(CONFIG)).items():
        layer = int(name.split(".")[2]) + 1 if ".layers." in name else 0
        shards.setdefault(layer, {})[name] = TensorInfo(shape, "float32")
    weight_map = {}
    for number, infos in shards.items():
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(infos, name)
        with open(tmp_path / name, "wb") as file:
            safetensors_file.SafetensorsWriter(file, infos)
            for tensor, info in infos.items():
                stripe = hashlib.sha256(tensor.encode()).digest()
                size = int(np.prod(info.shape)) * 4
                file.write(stripe)
                file.seek(size - 2 * len(stripe), os.SEEK_CUR)
                file.write(stripe)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    yield tmp_path
    shutil.rmtree(tmp_path)


def peak(*arguments) -> int:
    words = ["--model", "llama", *map(str, arguments)]
    result = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.splitlines()[-1])


def test_peak_memory_of_two_gigabytes(folder, same_bits):
    assert sum(file.stat().st_size for file in folder.glob("model-*")) > 2 * 10**9
    limit = LARGEST + 300 * 10**6
    there = peak("--input_path", folder, "--output_path", folder / "x.ckpt", "--qkv_concat")
    back = peak(
        "--input_path", folder / "x.ckpt", "--output_path", folder / "out", "--reversed", "--max_shard_size", "1GB"
    )
    assert max(there, back) < limit
    # Tensors pass through in pieces, so that far less is needed than promised; a slip to whole tensors would show.
    assert max(there, back) < 200 * 10**6
    before, after = open_weights(folder), open_weights(folder / "out")
    assert before.tensors == after.tensors
    for name in ("model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight"):
        assert same_bits(before.read(name), after.read(name)), name
