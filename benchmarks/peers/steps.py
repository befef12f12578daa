"""What the training peers share: they count real tokens and time their steps as `msft train` does.

Runs in the peers' environments, so it imports nothing of this project.
"""

import json
import time
from pathlib import Path

from transformers import Trainer, TrainerCallback


class StepClock(TrainerCallback):
    """Writes a JSON list with seconds, real tokens and loss of every step; a step's time includes fetching its data."""

    def __init__(self, path: str):
        self._path, self._began, self.tokens, self._steps = Path(path), 0.0, 0, []
        count_tokens(self)

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Take the time of a step."""
        now = time.perf_counter()
        self._steps.append({"seconds": now - self._began, "tokens": self.tokens, "loss": None})
        self._began, self.tokens = now, 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Take the loss of the step that has just ended."""
        if logs and "loss" in logs:
            self._steps[-1]["loss"] = float(logs["loss"])

    def on_train_end(self, args, state, control, **kwargs):
        """Write the file."""
        self._path.write_text(json.dumps(self._steps))


def count_tokens(clock: StepClock) -> None:
    """Let the Trainer tell the clock how many real tokens every batch has (the trainers offer no other place)."""
    original = Trainer.training_step

    def counted(self, model, inputs, *args, **kwargs):
        clock.tokens += real_tokens(inputs)
        return original(self, model, inputs, *args, **kwargs)

    Trainer.training_step = counted


def real_tokens(inputs) -> int:
    """Return the number of tokens that are no padding, from whichever mask the batch has."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs["input_ids"].numel()
    if mask.dim() == 4:
        # Real tokens may look at themselves.
        return int((mask[:, 0].diagonal(dim1=1, dim2=2) == 0).sum())
    # LLaMA-Factory's `packing` leaves the padding visible; what follows a row's last label is never a real example.
    supervised = inputs["labels"] != -100
    before_end = supervised.flip(1).cumsum(1).flip(1) > 0
    return int(((mask != 0) & before_end).sum())


def arguments(output_dir: str, batch_size: int, steps: int) -> dict:
    """Return the TrainingArguments that all peers are given: constant rate, no decay, fp32, every step logged."""
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": batch_size,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 42,
    }
