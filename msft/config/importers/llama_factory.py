"""From LLaMA-Factory's keys to the recipe's."""

from math import sqrt

from msft.config.importers import training_arguments
from msft.config.importers.adapters import put_adapter, put_frozen_dtype
from msft.config.importers.dataset_info import raw_files
from msft.config.importers.hub import folder_of
from msft.config.importers.translation import Translation
from msft.config.markers import shown
from msft.errors import did_you_mean

STAGES = ("sft", "pt")
METHODS = ("lora", "full")
BUILT = "stages sft and pt are built, with finetuning_type lora or full"
# Templates whose answers end without text of their own (efficient_eos): the model's own is the nearest.
OWN_TEMPLATE = (
    "baichuan",
    "baichuan2",
    "breeze",
    "chatglm2",
    "chatglm3",
    "falcon",
    "gemma2",
    "glm4",
    "solar",
)


def translate(translation: Translation) -> None:
    """Write the recipe of a LLaMA-Factory file."""
    keys, put = translation.keys, translation.put
    for key, known in (("stage", STAGES), ("finetuning_type", METHODS)):
        if getattr(keys, key) not in known:
            translation.refuse(key, f"{shown(getattr(keys, key))} is not supported: {BUILT}")
    training_arguments.translate(translation)
    put("model.pretrained", folder_of(keys.model_name_or_path), "model_name_or_path")
    put("model.seq_length", keys.cutoff_len, "cutoff_len")
    if keys.moe_aux_loss_coef is not None:
        put("model.moe_aux_loss_coef", keys.moe_aux_loss_coef, "moe_aux_loss_coef")
    put("recompute_config.recompute", not keys.disable_gradient_checkpointing, "disable_gradient_checkpointing")
    if translation.wrote("gradient_checkpointing"):
        translation.tell("gradient_checkpointing", "disable_gradient_checkpointing decides")
    _backend(translation)
    _pure_bf16(translation)
    if keys.finetuning_type == "lora":
        _adapter(translation)
    elif keys.adapter_name_or_path:
        translation.refuse("adapter_name_or_path", "is for finetuning_type lora")
    _data(translation)


def _backend(translation: Translation) -> None:
    """The toolkit's own framework, unless the file says otherwise."""
    if "backend" not in translation.document.data:
        translation.put("backend", "torch", "backend")


def _pure_bf16(translation: Translation) -> None:
    keys = translation.keys
    if keys.pure_bf16:
        translation.put("model.compute_dtype", "bfloat16", "pure_bf16")
        translation.tell("pure_bf16", "as bf16: tuned weights and moments are always float32 here")


def _adapter(translation: Translation) -> None:
    keys = translation.keys
    alpha = keys.lora_alpha or 2 * keys.lora_rank
    if keys.use_rslora:
        # alpha / sqrt(rank), by an alpha that is divided by the rank.
        alpha *= sqrt(keys.lora_rank)
    put_adapter(translation, _names(keys.lora_target), keys.lora_rank, alpha, keys.lora_dropout)
    put_frozen_dtype(translation)
    if keys.additional_target:
        patterns = [f"*{name}*" for name in _names(keys.additional_target)]
        translation.put("model.pet_config.freeze_exclude", patterns, "additional_target")
    adapters = _names(keys.adapter_name_or_path)
    if len(adapters) > 1:
        translation.refuse("adapter_name_or_path", "several adapters are not supported: merge all but one (msft merge)")
    elif adapters:
        translation.put("load_checkpoint", adapters[0], "adapter_name_or_path")


def _names(entries: list[str]) -> list[str]:
    return [name.strip() for entry in entries for name in entry.split(",") if name.strip()]


def _data(translation: Translation) -> None:
    keys, put = translation.keys, translation.put
    if keys.disable_shuffling:
        put("train_dataset.data_loader.shuffle", False, "disable_shuffling")
    if keys.neat_packing:
        put("train_dataset.packing", True, "neat_packing")
    elif keys.packing and keys.stage == "sft":
        message = (
            "packing without neat_packing lets examples see each other, which is not built: add neat_packing: true"
        )
        translation.refuse("packing", message)
    if keys.packing is False and keys.stage == "pt":
        translation.refuse("packing", "False is not supported with stage pt: texts are joined and cut")
    if keys.train_on_prompt:
        put("train_dataset.input_columns", ["input_ids"], "train_on_prompt")
    if keys.mask_history and keys.train_on_prompt:
        translation.refuse("mask_history", "stands beside train_on_prompt: write one of the two")
    _rows(translation, "dataset", "train_dataset")
    if keys.eval_dataset:
        _rows(translation, "eval_dataset", "eval_dataset")
    if keys.val_size:
        put("eval_dataset.data_loader.held_out", keys.val_size, "val_size")
    if (keys.eval_dataset or keys.val_size) and not translation.document.data.get("do_eval"):
        key = "eval_dataset" if keys.eval_dataset else "val_size"
        translation.tell(key, "without eval_strategy a run does not evaluate: steps or epoch")


def _rows(translation: Translation, key: str, name: str) -> None:
    """Write the raw block of a data set; without data sets, a MindRecord file must be named otherwise."""
    keys, at = translation.keys, f"{name}.data_loader.raw"
    is_named = f"{name}.data_loader.dataset_dir" in translation.given
    files = [] if is_named else raw_files(translation, key)
    if not (files or is_named) or not translation.put_files(name, files, key):
        return
    translation.put(f"{at}.max_length", keys.cutoff_len, "cutoff_len")
    if keys.preprocessing_num_workers:
        translation.put(f"{at}.num_workers", keys.preprocessing_num_workers, "preprocessing_num_workers")
    if keys.stage == "pt":
        translation.put(f"{at}.running_text", True, "stage")
        translation.put(f"{at}.begin", False, "stage")
        return
    translation.put(f"{at}.template", _template(translation, told=key == "dataset"), "template")
    if keys.mask_history:
        translation.put(f"{at}.last_answer_only", True, "mask_history")


def _template(translation: Translation, told: bool) -> str:
    from msft.data.turn_formats import LLAMA_FACTORY

    name = translation.keys.template
    if name is None or name in OWN_TEMPLATE:
        if told and name:
            why = "the tokenizer's own template is taken, else the family's (--train_dataset.data_loader.raw.template)"
            translation.tell("template", why)
        return ""
    if name not in LLAMA_FACTORY and told:
        known = ", ".join(sorted([*LLAMA_FACTORY, *OWN_TEMPLATE]))
        way = "without template it is the tokenizer's own"
        translation.refuse(
            "template", f"unknown template {name!r}{did_you_mean(name, LLAMA_FACTORY)} (known: {known}; {way})"
        )
    return f"llama_factory:{name}"
