"""The real MindFormers 1.3.2 on CPU: trains as its recipe says and writes the seconds of every step as JSON.

usage: mindformers_lora.py RECIPE OUT    (with tests/mindformers/oracle on PYTHONPATH)
"""

import json
import sys
import time
from pathlib import Path

from mindformers_cpu import load_recipe
from mindspore import Callback


class Clock(Callback):
    """Keeps the seconds of every step; reading the loss waits until the step is done."""

    def __init__(self):
        self.seconds = []
        self.began = 0.0

    def on_train_step_begin(self, run_context):
        """Start the clock."""
        self.began = time.perf_counter()

    def on_train_step_end(self, run_context):
        """Stop the clock."""
        run_context.original_args().net_outputs[0].asnumpy()
        self.seconds.append(time.perf_counter() - self.began)


def main(recipe: str, out: str) -> None:
    from mindformers import Trainer

    clock = Clock()
    Trainer(load_recipe(recipe), callbacks=[clock]).train()
    Path(out).write_text(json.dumps(clock.seconds))


main(*sys.argv[1:])
