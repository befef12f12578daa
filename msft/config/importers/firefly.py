"""Firefly's train_args files: their keys with its defaults, and what a recipe calls them."""

from typing import Annotated, Any

from pydantic import Field

from msft.config.importers import training_arguments
from msft.config.importers.adapters import put_adapter, put_frozen_dtype
from msft.config.importers.hub import folder_of
from msft.config.importers.training_arguments import Kernels, NoEqual, Rows, TrainingArguments, refused
from msft.config.importers.translation import Translation
from msft.config.markers import Number, Positive, PositiveNumber, Unused, shown
from msft.errors import did_you_mean

TASKS = ("sft", "pretrain")
MODES = ("full", "lora")
BUILT = "task_type sft and pretrain are built, with train_mode full or lora"
LORA = ("lora_rank", "lora_alpha", "lora_dropout")
# Templates that are made of token ids rather than of text: the model's own is the nearest.
OWN_TEMPLATE = ("chatglm2", "chatglm3")
Preferences = Annotated[Any, Unused("it is for task_type dpo")]


class Keys(TrainingArguments):
    """What a file of Firefly may hold: its own arguments beside TrainingArguments."""

    model_name_or_path: Annotated[str, Field(min_length=1)] = ""
    train_file: Annotated[str, Field(min_length=1)] = ""
    max_seq_length: Annotated[Positive, Field(ge=2)] | None = None
    template_name: str = ""
    task_type: str = "sft"
    train_mode: str | None = None
    lora_rank: Positive = 64
    lora_alpha: PositiveNumber = 16
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.05

    use_dora: refused("adapters are plain LoRA here", False) = None
    min_seq_length: refused("texts are joined and cut, without windows that overlap") = None
    window_step_size: refused("texts are joined and cut, without windows that overlap") = None
    use_unsloth: Kernels = None
    flash_attn: Kernels = None
    tokenize_num_workers: Rows = None
    eval_file: NoEqual = None
    max_prompt_length: Preferences = None
    beta: Preferences = None


def translate(translation: Translation) -> None:
    """Write the recipe of a Firefly file."""
    keys, put = translation.keys, translation.put
    mode = _mode(translation)
    if keys.task_type not in ("", *TASKS):
        translation.refuse("task_type", f"{shown(keys.task_type)} is not supported: {BUILT}")
    if keys.max_seq_length is None:
        translation.refuse("max_seq_length", "is missing")
    training_arguments.translate(translation)
    put("backend", translation.document.data.get("backend", "torch"), "backend")
    put("model.pretrained", folder_of(keys.model_name_or_path), "model_name_or_path")
    recompute = keys.gradient_checkpointing or keys.activation_checkpointing
    put("recompute_config.recompute", recompute, "gradient_checkpointing")
    if keys.max_seq_length:
        put("model.seq_length", keys.max_seq_length, "max_seq_length")
    if mode == "lora":
        put_adapter(translation, ["all"], keys.lora_rank, keys.lora_alpha, keys.lora_dropout)
        put_frozen_dtype(translation)
    _data(translation)


def _mode(translation: Translation) -> str:
    """Full, or LoRA. Files without train_mode were for scripts of their own: those with LoRA's keys for QLoRA's."""
    keys = translation.keys
    lora = next((key for key in LORA if translation.wrote(key)), None)
    mode = keys.train_mode or ("qlora" if lora else "full")
    if mode not in MODES:
        key = "train_mode" if keys.train_mode else lora
        without = "" if keys.train_mode else f"{key} without train_mode means qlora; "
        way = "--train_mode lora trains the same adapter on the model's own weights" if mode == "qlora" else BUILT
        translation.refuse(key, f"{without}{shown(mode)} is not supported: {way}")
    return mode


def _data(translation: Translation) -> None:
    keys, put, at = translation.keys, translation.put, "train_dataset.data_loader.raw"
    if not translation.put_files("train_dataset", [{"path": keys.train_file}], "train_file"):
        return
    if keys.max_seq_length:
        put(f"{at}.max_length", keys.max_seq_length, "max_seq_length")
    if keys.task_type == "pretrain":
        put(f"{at}.running_text", True, "task_type")
        put(f"{at}.end", False, "task_type")
    else:
        put(f"{at}.template", _template(translation), "template_name")


def _template(translation: Translation) -> str:
    from msft.data.turn_formats import FIREFLY

    name = translation.keys.template_name
    if name in OWN_TEMPLATE:
        translation.tell("template_name", "the tokenizer's own template is taken, else the family's")
        return ""
    if name and name not in FIREFLY:
        known = ", ".join(sorted(each for each in (*FIREFLY, *OWN_TEMPLATE) if each != "plain"))
        message = f"unknown template {name!r}{did_you_mean(name, FIREFLY)} (known: {known})"
        translation.refuse("template_name", message)
    return f"firefly:{name or 'plain'}"
