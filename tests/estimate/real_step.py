"""Two real steps of a recipe on random weights and random full rows, on CPU: the process whose peak is measured.

usage: real_step.py RECIPE.yaml [FLAGS]

Every token is supervised and no row is padded, as the estimate assumes.
"""

import sys
from importlib import import_module

import numpy as np

from msft.config import derive
from msft.config.load import load_recipe
from msft.convert.random_weights import RandomWeights
from msft.data.batches import BatchStream
from msft.data.dataset import InMemoryDataset

STEPS = 2


def main() -> None:
    recipe = load_recipe(sys.argv[1], sys.argv[2:])
    spec = derive.model_spec(recipe)
    tuning = derive.tuning(recipe, spec)
    device, _ = import_module(f"msft.backend.{recipe.backend}.device").pick("cpu")
    build = import_module(f"msft.backend.{recipe.backend}.engine").build
    engine = build(spec, RandomWeights(spec, 0), tuning, derive.runtime(recipe, device, parallel=False))
    for batches in steps(recipe, spec.vocab_size):
        engine.train_step(batches, 1e-4)


def steps(recipe, vocabulary):
    """The micro-batches of each step."""
    rows, micro_batches = derive.micro_batch_size(recipe), derive.gradient_accumulation(recipe)
    shape = STEPS * rows * micro_batches, derive.seq_length(recipe) + 1
    ids = np.random.default_rng(0).integers(1, vocabulary, shape, dtype=np.int32)
    dataset = InMemoryDataset([{"input_ids": row, "labels": row} for row in ids])
    stream = BatchStream(dataset, batch_size=rows, gradient_accumulation_steps=micro_batches, pad_id=0)
    return stream.steps(prefetch=0)


main()
