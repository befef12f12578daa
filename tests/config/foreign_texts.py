"""Files of other toolkits written for tests."""

import json
from pathlib import Path

LLAMA_FACTORY = """\
### model
model_name_or_path: models/tiny
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all

### dataset
dataset: identity,chats
template: llama3
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16

### output
output_dir: saves/tiny/lora/sft
logging_steps: 10
save_steps: 200
plot_loss: true
overwrite_output_dir: true
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
val_size: 0.1
per_device_eval_batch_size: 2
eval_strategy: steps
eval_steps: 100
"""

INFO = {
    "identity": {"file_name": "identity.json"},
    "chats": {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "online": {"hf_hub_url": "llamafactory/alpaca_en"},
    "pairs": {"file_name": "pairs.json", "ranking": True},
}

FIREFLY = {
    "output_dir": "output/firefly-tiny-sft-lora",
    "model_name_or_path": "models/tiny",
    "train_file": "./data/dummy_data.jsonl",
    "template_name": "qwen",
    "train_mode": "lora",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "learning_rate": 2e-4,
    "max_seq_length": 1024,
    "logging_steps": 100,
    "save_steps": 100,
    "save_total_limit": 1,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 100,
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "gradient_checkpointing": True,
    "disable_tqdm": False,
    "optim": "paged_adamw_32bit",
    "seed": 42,
    "fp16": True,
    "report_to": "tensorboard",
    "dataloader_num_workers": 0,
    "save_strategy": "steps",
    "weight_decay": 0,
    "max_grad_norm": 0.3,
    "remove_unused_columns": False,
}


def write_info(folder: Path, info: dict = INFO) -> Path:
    """Write a dataset_info.json; returns its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder
