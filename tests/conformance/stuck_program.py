"""`msft train`, with rank 1 stuck in its third step, outside of anything that all ranks do together."""

import os
import sys
import time

from msft.backend.engine import FrameworkEngine
from msft.cli.train import main

train_step = FrameworkEngine.train_step


def wait_for_ever():
    time.sleep(3600)


def step(self, micro_batches, learning_rate):
    if self.step == 2 and os.environ.get("RANK_ID", os.environ.get("RANK")) == "1":
        wait_for_ever()
    return train_step(self, micro_batches, learning_rate)


if __name__ == "__main__":
    FrameworkEngine.train_step = step
    sys.exit(main())
