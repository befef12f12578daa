"""LLaMA-Factory's own preprocessing into its tokenised cache, as JSON with its seconds.

usage: llamafactory_tokenise.py MODEL ALPACA LENGTH
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer


def main() -> None:
    model, data, length = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "dataset_info.json").write_text(json.dumps({"rows": {"file_name": data}}))
        settings = {
            "model_name_or_path": model,
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "dataset_dir": folder,
            "dataset": "rows",
            "template": "smollm2",
            "cutoff_len": int(length),
            "preprocessing_num_workers": 2,
            "overwrite_cache": True,
            "tokenized_path": f"{folder}/cache",
            "output_dir": f"{folder}/out",
            "report_to": "none",
            "use_cpu": True,
        }
        model_args, data_args, training_args, *_ = get_train_args(settings)
        tokenizer = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data_args)
        began = time.perf_counter()
        get_dataset(template, model_args, data_args, training_args, stage="sft", **tokenizer)
        print(json.dumps({"seconds": time.perf_counter() - began}))


main()
