"""LLaMA-Factory's own training function, padded, with `packing` or with `neat_packing`.

usage: llamafactory_sft.py MODEL DATA ADAPTER STEPS_FILE BATCH_SIZE STEPS LENGTH padded|packing|neat_packing
"""

import json
import sys
import tempfile
from pathlib import Path

from llamafactory.train.tuner import run_exp
from steps import StepClock, arguments


def main() -> None:
    model, data, adapter, clock, batch_size, steps, length, packing = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        names = {"rows": {"file_name": str(Path(data).resolve())}}
        Path(folder, "dataset_info.json").write_text(json.dumps(names))
        own = {} if packing == "padded" else {packing: True}
        settings = {
            **arguments(f"{folder}/out", int(batch_size), int(steps)),
            "model_name_or_path": model,
            "adapter_name_or_path": adapter,
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "dataset_dir": folder,
            "dataset": "rows",
            "template": "smollm2",
            "cutoff_len": int(length),
            "disable_shuffling": True,
            # Without this it trains with recomputation.
            "disable_gradient_checkpointing": True,
            "infer_dtype": "float32",
            **own,
        }
        run_exp(settings, callbacks=[StepClock(clock)])


main()
