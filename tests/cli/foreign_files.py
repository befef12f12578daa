"""Recipes of other toolkits, as their repositories have them, and data for them."""

import json

from tests.launch.jobs import ROOT

LLAMA_FACTORY = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16

### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""
FIREFLY = """\
{
    "output_dir": "output/firefly-qwen1.5-7b-sft-lora",
    "model_name_or_path": "Qwen/Qwen1.5-7B-Chat",
    "train_file": "./data/dummy_data.jsonl",
    "template_name": "qwen",
    "train_mode": "lora",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "learning_rate": 2e-4,
    "max_seq_length": 1024,
    "save_steps": 100,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 100,
    "lora_rank": 64,
    "gradient_checkpointing": true,
    "optim": "paged_adamw_32bit",
    "fp16": true,
    "report_to": "tensorboard",
    "max_grad_norm": 0.3
}
"""


def write_foreign_files(folder):
    """The toolkits' files under a folder, where their examples have them, and the quickstart's rows as their data."""
    rows = json.loads((ROOT / "configs" / "quickstart_alpaca.json").read_text())
    llama_factory, firefly = folder / "examples" / "train_lora", folder / "train_args" / "sft" / "lora"
    for path in (llama_factory, firefly, folder / "data"):
        path.mkdir(parents=True)
    (llama_factory / "llama3_lora_sft.yaml").write_text(LLAMA_FACTORY)
    (firefly / "qwen1.5-7b-sft-lora.json").write_text(FIREFLY)
    info = {"identity": {"file_name": "identity.json"}, "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    for name in info:
        (folder / "data" / f"{name}.json").write_text(json.dumps(rows))
    pairs = [{"conversation": [{"human": row["instruction"], "assistant": row["output"]}]} for row in rows]
    (folder / "data" / "dummy_data.jsonl").write_text("\n".join(map(json.dumps, pairs)))
