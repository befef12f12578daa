"""transformers' Trainer with peft, on rows that are padded to the longest of a batch or to a fixed length.

usage: hf_trainer.py MODEL ROWS ADAPTER STEPS_FILE BATCH_SIZE STEPS PAD_TO (0 = the longest)
"""

import json
import sys
import tempfile

import torch
from peft import PeftModel
from steps import StepClock, arguments
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def main() -> None:
    model, rows, adapter, clock, *numbers = sys.argv[1:]
    batch_size, steps, pad_to = map(int, numbers)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    with tempfile.TemporaryDirectory() as folder:
        words = TrainingArguments(
            **arguments(folder, batch_size, steps), bf16=False, train_sampling_strategy="sequential"
        )
        data = json.load(open(rows))
        trainer = Trainer(
            tuned,
            words,
            train_dataset=data,
            data_collator=lambda batch: padded(batch, pad_to),
            callbacks=[StepClock(clock)],
        )
        trainer.train()


def padded(batch: list[dict], pad_to: int) -> dict:
    """Return the rows of a batch as tensors, padded at the right; labels of padding do not count."""
    width = pad_to or max(len(row["input_ids"]) for row in batch)
    columns = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    for row in batch:
        row["attention_mask"] = [1] * len(row["input_ids"])
    return {
        name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in batch])
        for name, fill in columns.items()
    }


main()
