"""TRL's SFTTrainer, with and without packing, in fp32 or with its own defaults (bf16, gradient checkpointing).

usage: trl_sft.py MODEL ROWS ADAPTER STEPS_FILE BATCH_SIZE STEPS LENGTH packed|padded fp32|defaults
"""

import json
import sys
import tempfile

import torch
from datasets import Dataset
from peft import PeftModel
from steps import StepClock, arguments
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    model, rows, adapter, clock, batch_size, steps, length, packing, precision = sys.argv[1:]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    own = {"bf16": False, "gradient_checkpointing": False} if precision == "fp32" else {}
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            **arguments(folder, int(batch_size), int(steps)),
            max_length=int(length),
            packing=packing == "packed",
            train_sampling_strategy="sequential",
            **own,
        )
        trainer = SFTTrainer(
            tuned,
            config,
            train_dataset=Dataset.from_list(json.load(open(rows))),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[StepClock(clock)],
        )
        trainer.train()


main()
