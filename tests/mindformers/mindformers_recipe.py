"""MindFormers' own Llama 2 recipes, shrunk to run on a CPU in seconds; both toolkits read the file written here."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-mindformers"
SHIPPED = ENVIRONMENT / "lib/python3.11/site-packages/configs/llama2"
MODEL = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2, "vocab_size": 600, "multiple_of": 16}
SEQ_LENGTH = 192
DTYPES = ("compute_dtype", "layernorm_compute_type", "softmax_compute_type", "rotary_dtype", "param_init_type")


def shipped_recipes() -> list[Path]:
    """Return MindFormers' recipes for Llama 2 from its wheel, but for quantization and other adapters than LoRA."""
    other = re.compile(r"ptq|rtn|quant|tuning|slora")
    return [path for path in sorted(SHIPPED.glob("*.yaml")) if not other.search(path.name.split("_llama2_")[1])]


def write(
    path: Path, kind: str, data: Path, checkpoint: Path, output: Path, changes: dict | None = None, ours: bool = False
) -> Path:
    """Write a small copy of MindFormers' (or our) `{lora,finetune}_llama2_7b.yaml` (`kind`) and return its path.

    Everything runs in float32 with plain operators, dropout 0 and unshuffled data. `changes` replaces
    single values by dotted key.
    """
    folder = ROOT / "configs/llama2" if ours else SHIPPED
    source = folder / f"{kind}_llama2_7b.yaml"
    recipe = yaml.safe_load(source.read_text(encoding="utf-8"))
    recipe |= {"load_checkpoint": str(checkpoint), "output_dir": str(output), "use_parallel": False}
    recipe["runner_config"] = {"epochs": 4, "batch_size": 2, "sink_mode": False, "sink_size": -1}
    recipe["optimizer"] |= {"weight_decay": 0.1}
    recipe["lr_schedule"] |= {"learning_rate": 1e-3, "lr_end": 1e-5, "warmup_ratio": 0.2}
    for name in ("train_dataset", "eval_dataset"):
        recipe[name]["data_loader"] = {"type": "MindDataset", "dataset_dir": str(data), "shuffle": False}
        recipe[name] |= {"num_parallel_workers": 1, "input_columns": ["input_ids", "labels"]}
        recipe[f"{name}_task"]["dataset_config"] = recipe[name]
    recipe["context"] = {"mode": 0, "device_target": "CPU", "max_call_depth": 10000}
    model = recipe["model"]["model_config"]
    model |= MODEL | {"seq_length": SEQ_LENGTH, "max_position_embedding": SEQ_LENGTH, "checkpoint_name_or_path": ""}
    model |= dict.fromkeys(DTYPES, "float32")
    model |= {"use_flash_attention": False, "fused_rms_norm": False, "use_rope_slice": True}
    if kind == "lora":
        model["pet_config"] |= {"lora_rank": 4, "lora_alpha": 16, "lora_dropout": 0.0}
    recipe["runner_wrapper"] = {"type": "MFTrainOneStepCell", "scale_sense": 1.0, "use_clip_grad": True}
    recipe["callbacks"] = [
        {"type": "MFLossMonitor"},
        {"type": "CheckpointMonitor", "prefix": "tiny", "save_checkpoint_steps": 20, "integrated_save": False},
    ]
    recipe["eval_callbacks"] = []
    for key, value in (changes or {}).items():
        *blocks, last = key.split(".")
        block = recipe
        for name in blocks:
            block = block[name]
        block[last] = value
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path
