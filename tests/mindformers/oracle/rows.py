"""RECIPE OUT.npz: one epoch of the recipe's training data as MindFormers' pipeline delivers it, in its order."""

import sys

import numpy as np
from mindformers_cpu import load_recipe


def main(recipe: str, out: str) -> None:
    from mindformers.dataset import build_dataset, check_dataset_config

    config = load_recipe(recipe)
    check_dataset_config(config)
    columns = config.train_dataset.input_columns
    batches = list(build_dataset(config.train_dataset_task).create_tuple_iterator(num_epochs=1, output_numpy=True))
    np.savez(out, **{name: np.concatenate([batch[i] for batch in batches]) for i, name in enumerate(columns)})


main(*sys.argv[1:])
