"""RECIPE OUT: train as `run_mindformer.py` does; OUT.json gets the steps, OUT.ckpt the parameters before the first.

The other checkpoints are MindFormers' own (CheckpointMonitor), in the recipe's `output_dir`.
"""

import json
import sys

import mindspore as ms
from mindformers_cpu import load_recipe
from mindspore import Callback


class Recorder(Callback):
    """Keeps what is trained with which weight decay, and every step's loss, learning rate and gradient norm."""

    def __init__(self, start: str):
        self.start = start
        self.steps = []
        self.weight_decay = {}

    def on_train_begin(self, run_context):
        wrapper = run_context.original_args().train_network
        ms.save_checkpoint(wrapper.network, self.start)
        decays = [float(decay.asnumpy()) for decay in wrapper.optimizer.weight_decay]
        names = [parameter.name for parameter in wrapper.optimizer.parameters]
        self.weight_decay = dict(zip(names, decays, strict=True))

    def on_train_step_end(self, run_context):
        loss, overflow, scale, rate, norm = run_context.original_args().net_outputs
        number = {"loss": loss, "learning_rate": rate, "grad_norm": norm}
        self.steps.append({name: None if v is None else float(v.asnumpy().reshape(())) for name, v in number.items()})


def main(recipe: str, out: str) -> None:
    from mindformers import Trainer

    config = load_recipe(recipe)
    recorder = Recorder(out + ".ckpt")
    Trainer(config, callbacks=[recorder]).train()
    result = {"steps": recorder.steps, "weight_decay": recorder.weight_decay}
    with open(out + ".json", "w", encoding="utf-8") as file:
        json.dump(result, file)


main(*sys.argv[1:])
