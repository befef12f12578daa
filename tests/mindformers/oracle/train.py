"""RECIPE OUT: train as `run_mindformer.py` does; OUT.json gets the steps, OUT.npz the parameters before the first.

Checkpoints are MindFormers' own (CheckpointMonitor), in the recipe's `output_dir`.
"""

import json
import sys

import numpy as np
from mindformers_cpu import load_recipe
from mindspore import Callback


class Recorder(Callback):
    """Keeps every step's loss, learning rate and gradient norm, and the first parameters."""

    def __init__(self):
        self.steps = []
        self.first = {}
        self.trained = []
        self.groups = []

    def on_train_begin(self, run_context):
        wrapper = run_context.original_args().train_network
        self.first = {name: value.asnumpy().copy() for name, value in wrapper.network.parameters_dict().items()}
        self.trained = [parameter.name for parameter in wrapper.network.trainable_params()]
        decays = [float(decay.asnumpy()) for decay in wrapper.optimizer.weight_decay]
        names = [parameter.name for parameter in wrapper.optimizer.parameters]
        self.groups = dict(zip(names, decays, strict=True))

    def on_train_step_end(self, run_context):
        loss, overflow, scale, rate, norm = run_context.original_args().net_outputs
        number = {"loss": loss, "learning_rate": rate, "grad_norm": norm}
        self.steps.append({name: None if v is None else float(v.asnumpy().reshape(())) for name, v in number.items()})


def main(recipe: str, out: str) -> None:
    from mindformers import Trainer

    config = load_recipe(recipe)
    recorder = Recorder()
    Trainer(config, callbacks=[recorder]).train()
    result = {"steps": recorder.steps, "trained": recorder.trained, "weight_decay": recorder.groups}
    with open(out + ".json", "w", encoding="utf-8") as file:
        json.dump(result, file)
    np.savez(out + ".npz", **recorder.first)


main(*sys.argv[1:])
