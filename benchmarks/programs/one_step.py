"""Seconds of a steady LoRA step of a small random Llama on one engine, as JSON.

usage: one_step.py ENGINE ROWS LENGTH LAYERS RANK
"""

import json
import sys
import time
from importlib import import_module
from statistics import median

import numpy as np

from msft.backend.contract import Batch, Lora, Runtime, Tuning
from msft.convert.random_weights import RandomWeights
from msft.data.batches import BatchStream
from msft.data.dataset import InMemoryDataset
from msft.models.families import spec_from_hf
from msft.models.shapes import linear_modules

STEPS = 6
CONFIG = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def main() -> None:
    engine, *words = sys.argv[1:]
    rows, length, layers, rank = map(int, words)
    spec = spec_from_hf(CONFIG | {"num_hidden_layers": layers})
    modules = tuple(name for name in linear_modules(spec) if ".self_attn." in name)
    tuning = Tuning(lora=Lora(rank, 2.0 * rank, 0.0, modules))
    device, _ = import_module(f"msft.backend.{engine}.device").pick("cpu")
    built = import_module(f"msft.backend.{engine}.engine").build(
        spec, RandomWeights(spec, 0), tuning, Runtime(device=device)
    )
    batches = random_batches(rows, length, spec.vocab_size)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        built.train_step(batches, 1e-4)
        times.append(time.perf_counter() - began)
    # The first step compiles.
    print(json.dumps({"seconds": median(times[1:])}))


def random_batches(rows: int, length: int, vocabulary: int) -> list[Batch]:
    """Return a step of full rows, one example each, every token supervised."""
    ids = np.random.default_rng(0).integers(1, vocabulary, (rows, length + 1), dtype=np.int32)
    dataset = InMemoryDataset([{"input_ids": row, "labels": row} for row in ids])
    return next(BatchStream(dataset, batch_size=rows, pad_id=0).steps(prefetch=0))


main()
