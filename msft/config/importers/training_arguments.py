"""transformers' TrainingArguments, which both toolkits take: their keys, defaults, and what a recipe calls them."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from msft.config.block import Block
from msft.config.importers.translation import Translation
from msft.config.markers import (
    Count,
    NotNegative,
    Number,
    Positive,
    PositiveNumber,
    Refused,
    Share,
    Switch,
    Unused,
    shown,
)

Told = Annotated[Any, Unused("every step is in trainer_log.jsonl and in TensorBoard's events")]
Rows = Annotated[Any, Unused("rows are prepared and batches are made by msft itself")]
Spread = Annotated[Any, Unused("msft's launcher and engines set up several processes themselves")]
Kernels = Annotated[Any, Unused("the engine picks its kernels itself")]
Hub = Annotated[Any, Unused("nothing is downloaded or uploaded")]
NoEqual = Annotated[Any, Unused("has no equal here")]
Recomputed = Annotated[Any, Unused("blocks are recomputed as a whole")]
Saves = Annotated[Any, Unused("checkpoints are whole, and are resumed from on either engine")]

ALL_KEPT = 1_000_000
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "paged_adamw", "paged_adamw_32bit", "adamw_apex_fused")
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}


def refused(why: str, *neutral: Any) -> Any:
    """Return the type of a key whose values but the neutral ones would train otherwise, in a way that is not built."""
    return Annotated[Any, Refused(why, neutral)]


def _resume(value: Any) -> Any:
    if isinstance(value, bool | str):
        return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
    raise ValueError(f"must be true, false or the path of a checkpoint, not {shown(value)}")


class TrainingArguments(Block):
    """The keys with transformers' defaults; None where it has none, or where it depends on another key."""

    output_dir: Annotated[str, Field(min_length=1)] = "trainer_output"
    do_train: Switch | None = None
    do_eval: Switch = False
    do_predict: refused("prediction over a data set is not part of training (run_mode: predict)", False) = None
    per_device_train_batch_size: Positive = 8
    per_device_eval_batch_size: Positive = 8
    gradient_accumulation_steps: Positive = 1
    learning_rate: NotNegative = 5e-5
    weight_decay: NotNegative = 0.0
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: PositiveNumber = 1e-8
    max_grad_norm: NotNegative = 1.0
    num_train_epochs: PositiveNumber = 3.0
    max_steps: Annotated[int, Field(ge=-1)] = -1
    lr_scheduler_type: str = "linear"
    warmup_ratio: Share = 0.0
    warmup_steps: NotNegative = 0
    optim: str = "adamw_torch"
    bf16: Switch = False
    fp16: Switch = False
    seed: Count = 42
    logging_steps: PositiveNumber = 500
    logging_strategy: str = "steps"
    save_strategy: str = "steps"
    save_steps: PositiveNumber = 500
    save_total_limit: Positive | None = None
    eval_strategy: str | None = None
    evaluation_strategy: str | None = None
    eval_steps: PositiveNumber | None = None
    resume_from_checkpoint: Annotated[bool | str, BeforeValidator(_resume)] | None = None
    gradient_checkpointing: Switch = False
    activation_checkpointing: Switch = False
    group_by_length: Switch = False
    train_sampling_strategy: str = "random"
    dataloader_drop_last: Switch = False
    deepspeed: Any = None
    fsdp: Any = None
    report_to: Any = None

    neftune_noise_alpha: refused("noise on embeddings is not built") = None
    label_smoothing_factor: refused("label smoothing is not built", 0, 0.0) = None
    lr_scheduler_kwargs: refused("schedules have no further settings", {}) = None
    optim_target_modules: refused("optimizers are AdamW here") = None
    optim_args: refused("optimizers have no further settings", "") = None
    tf32: refused("matrix products run in the dtype that is named", False) = None
    auto_find_batch_size: refused("msft estimate tells the largest batch that fits", False) = None
    load_best_model_at_end: refused("the last model is written; evaluation tells which step was best", False) = None
    adafactor: refused("optimizers are AdamW here", False) = None
    torch_compile: Kernels = None
    torch_compile_backend: Kernels = None
    torch_compile_mode: Kernels = None
    liger_kernel_config: Kernels = None
    use_cache: Kernels = None
    bf16_full_eval: Kernels = None
    fp16_full_eval: Kernels = None
    half_precision_backend: Kernels = None
    fp16_opt_level: Kernels = None
    fp16_backend: Kernels = None
    use_cpu: Annotated[Any, Unused("device says what is trained on")] = None
    no_cuda: Annotated[Any, Unused("device says what is trained on")] = None
    use_ipex: Kernels = None
    jit_mode_eval: Kernels = None
    use_liger_kernel: Kernels = None
    gradient_checkpointing_kwargs: Recomputed = None
    activation_checkpointing_kwargs: Recomputed = None
    fsdp_config: Spread = None
    fsdp_min_num_params: Spread = None
    fsdp_transformer_layer_cls_to_wrap: Spread = None
    ddp_timeout: Annotated[Any, Unused("hang_timeout says how long silence may last")] = None
    ddp_backend: Spread = None
    ddp_find_unused_parameters: Spread = None
    ddp_bucket_cap_mb: Spread = None
    ddp_broadcast_buffers: Spread = None
    ddp_static_graph: Spread = None
    local_rank: Spread = None
    accelerator_config: Spread = None
    parallelism_config: Spread = None
    average_tokens_across_devices: Annotated[Any, Unused("the loss is the mean over all tokens of all devices")] = None
    split_batches: Spread = None
    dispatch_batches: Spread = None
    dataloader_num_workers: Rows = None
    dataloader_pin_memory: Rows = None
    dataloader_persistent_workers: Rows = None
    dataloader_prefetch_factor: Rows = None
    dataloader_in_order: Rows = None
    dataloader_multiprocessing_context: Rows = None
    remove_unused_columns: Rows = None
    length_column_name: Rows = None
    label_names: Rows = None
    data_seed: Annotated[Any, Unused("the order of rows follows seed")] = None
    ignore_data_skip: Annotated[Any, Unused("a resumed run continues with the row after the last one")] = None
    full_determinism: Annotated[Any, Unused("a run is a function of recipe, weights, data and seed")] = None
    logging_dir: Told = None
    logging_first_step: Told = None
    logging_nan_inf_filter: Told = None
    log_level: Told = None
    log_level_replica: Told = None
    log_on_each_node: Told = None
    disable_tqdm: Told = None
    run_name: Told = None
    include_num_input_tokens_seen: Told = None
    include_tokens_per_second: Told = None
    project: Told = None
    trackio_space_id: Told = None
    trackio_bucket_id: Told = None
    trackio_static_space_id: Told = None
    overwrite_output_dir: Annotated[Any, Unused("a new run sets the results of an earlier one aside")] = None
    save_only_model: Saves = None
    save_safetensors: Saves = None
    save_on_each_node: Saves = None
    enable_jit_checkpoint: Saves = None
    restore_callback_states_from_checkpoint: Saves = None
    eval_accumulation_steps: NoEqual = None
    eval_delay: NoEqual = None
    eval_on_start: NoEqual = None
    eval_do_concat_batches: NoEqual = None
    eval_use_gather_object: NoEqual = None
    batch_eval_metrics: NoEqual = None
    include_for_metrics: NoEqual = None
    include_inputs_for_metrics: NoEqual = None
    metric_for_best_model: NoEqual = None
    greater_is_better: NoEqual = None
    prediction_loss_only: NoEqual = None
    past_index: NoEqual = None
    torch_empty_cache_steps: NoEqual = None
    skip_memory_metrics: NoEqual = None
    debug: NoEqual = None
    sortish_sampler: NoEqual = None
    predict_with_generate: refused("evaluation gives the loss per token, it generates nothing", False) = None
    generation_max_length: NoEqual = None
    generation_num_beams: NoEqual = None
    generation_config: NoEqual = None
    push_to_hub: Hub = None
    hub_model_id: Hub = None
    hub_strategy: Hub = None
    hub_token: Hub = None
    hub_private_repo: Hub = None
    hub_always_push: Hub = None
    hub_revision: Hub = None


def translate(translation: Translation) -> None:
    """Write what TrainingArguments say."""
    keys, put = translation.keys, translation.put
    put("output_dir", keys.output_dir, "output_dir")
    put("seed", keys.seed, "seed")
    put("runner_config.batch_size", keys.per_device_train_batch_size, "per_device_train_batch_size")
    put("runner_config.gradient_accumulation_steps", keys.gradient_accumulation_steps, "gradient_accumulation_steps")
    put("train_dataset.drop_remainder", keys.dataloader_drop_last, "dataloader_drop_last")
    _order(translation)
    if keys.resume_from_checkpoint is not None:
        put("resume_training", keys.resume_from_checkpoint, "resume_from_checkpoint")
    _length(translation)
    _optimizer(translation)
    _schedule(translation)
    _precision(translation)
    _callbacks(translation)
    _evaluation(translation)
    _processes(translation)
    if keys.report_to not in (None, "none", "tensorboard", ["none"], ["tensorboard"]):
        translation.tell("report_to", "has no equal here: trainer_log.jsonl and TensorBoard's events are written")


def _order(translation: Translation) -> None:
    keys, key = translation.keys, "train_sampling_strategy"
    known = ("random", "sequential", "group_by_length")
    if keys.train_sampling_strategy not in known:
        translation.refuse(key, f"must be {', '.join(known)}, not {shown(keys.train_sampling_strategy)}")
    grouped = keys.train_sampling_strategy == "group_by_length"
    if keys.group_by_length or grouped:
        translation.put("train_dataset.length_grouping", True, key if grouped else "group_by_length")
    if keys.train_sampling_strategy == "sequential":
        translation.put("train_dataset.data_loader.shuffle", False, key)


def _length(translation: Translation) -> None:
    keys = translation.keys
    if keys.max_steps > 0:
        # Each epoch has a step at least, so the run ends by its steps.
        translation.put("runner_config.epochs", keys.max_steps, "max_steps")
        translation.put("runner_config.stop_step", keys.max_steps, "max_steps")
        # A warm-up that goes beyond the last step only rises: whatever the total, the rates are the same.
        if keys.warmup_steps <= keys.max_steps:
            translation.put("lr_schedule.total_steps", keys.max_steps, "max_steps")
        if translation.wrote("num_train_epochs"):
            translation.tell("num_train_epochs", "max_steps wins")
    elif keys.num_train_epochs % 1:
        message = f"{keys.num_train_epochs:g} is not supported: parts of an epoch are written as max_steps"
        translation.refuse("num_train_epochs", message)
    else:
        translation.put("runner_config.epochs", int(keys.num_train_epochs), "num_train_epochs")


def _optimizer(translation: Translation) -> None:
    keys, put = translation.keys, translation.put
    if keys.optim not in ADAMW:
        known = "AdamW with float32 moments (adamw_torch) is"
        translation.refuse("optim", f"{shown(keys.optim)} is not supported: {known} what is built")
    elif "paged" in keys.optim:
        translation.tell("optim", "AdamW with float32 moments, which are not paged here")
    put("optimizer.type", "AdamW", "optim")
    put("optimizer.beta1", keys.adam_beta1, "adam_beta1")
    put("optimizer.beta2", keys.adam_beta2, "adam_beta2")
    put("optimizer.eps", keys.adam_epsilon, "adam_epsilon")
    put("optimizer.weight_decay", keys.weight_decay, "weight_decay")
    put("runner_wrapper.use_clip_grad", keys.max_grad_norm > 0, "max_grad_norm")
    if keys.max_grad_norm:
        put("runner_wrapper.max_grad_norm", keys.max_grad_norm, "max_grad_norm")


def _schedule(translation: Translation) -> None:
    keys, put, kind = translation.keys, translation.put, translation.keys.lr_scheduler_type
    put("lr_schedule.learning_rate", keys.learning_rate, "learning_rate")
    if kind not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        translation.refuse("lr_scheduler_type", f"{shown(kind)} is not supported: {known} are built")
        return
    put("lr_schedule.type", SCHEDULES[kind], "lr_scheduler_type")
    # transformers takes steps below 1 as a ratio.
    by_steps = keys.warmup_steps >= 1
    key = "warmup_steps" if keys.warmup_steps else "warmup_ratio"
    if kind == "constant":
        for name in ("warmup_steps", "warmup_ratio"):
            if getattr(keys, name):
                translation.tell(name, "lr_scheduler_type constant has no warm-up, constant_with_warmup has")
    elif by_steps:
        put("lr_schedule.warmup_steps", keys.warmup_steps, key)
        if keys.warmup_ratio:
            translation.tell("warmup_ratio", "warmup_steps wins")
    elif keys.warmup_steps or keys.warmup_ratio:
        put("lr_schedule.warmup_ratio", keys.warmup_steps or keys.warmup_ratio, key)
        put("lr_schedule.warmup_round_up", True, key)


def _precision(translation: Translation) -> None:
    """Tuned weights are float32 here as there; frozen ones have the dtype that is computed in."""
    keys, put = translation.keys, translation.put
    if keys.bf16 and keys.fp16:
        translation.refuse("fp16", "stands beside bf16: write one of the two")
        return
    if keys.bf16 or keys.fp16:
        key, dtype = ("bf16", "bfloat16") if keys.bf16 else ("fp16", "float16")
        put("model.compute_dtype", dtype, key)
    if keys.fp16:
        scale = {"type": "DynamicLossScaleUpdateCell", "loss_scale_value": 65536, "scale_factor": 2}
        put("runner_wrapper.scale_sense", {**scale, "scale_window": 2000}, "fp16")


def _callbacks(translation: Translation) -> None:
    keys, callbacks = translation.keys, [{"type": "MFLossMonitor"}]
    _every(translation, callbacks[0], 0, "logging", "per_print_times")
    if keys.save_strategy != "no":
        kept = keys.save_total_limit or ALL_KEPT
        callbacks.append({"type": "CheckpointMonitor", "keep_checkpoint_max": kept})
        translation.stands(("callbacks", 1, "keep_checkpoint_max"), "save_total_limit")
        _every(translation, callbacks[1], 1, "save", "save_checkpoint_steps")
    translation.put("callbacks", callbacks, "logging_steps")


def _every(translation: Translation, callback: dict, index: int, what: str, name: str) -> None:
    keys, key = translation.keys, f"{what}_steps"
    strategy, steps = getattr(keys, f"{what}_strategy"), getattr(keys, key)
    if strategy not in ("steps", "no"):
        translation.tell(f"{what}_strategy", f"{strategy} has no equal here: it is by steps, every {steps:g}")
    if steps % 1:
        translation.refuse(key, f"{steps:g} is not supported: write a number of steps")
        return
    callback[name] = int(steps)
    translation.stands(("callbacks", index, name), key)


def _evaluation(translation: Translation) -> None:
    keys, put = translation.keys, translation.put
    key = "eval_strategy" if keys.eval_strategy else "evaluation_strategy"
    strategy = keys.eval_strategy or keys.evaluation_strategy or "no"
    if strategy not in ("no", "steps", "epoch"):
        translation.refuse(key, f"must be no, steps or epoch, not {shown(strategy)}")
        return
    put("run_mode", "eval" if keys.do_train is False and keys.do_eval else "finetune", "do_train")
    if keys.do_eval and strategy == "no":
        translation.tell("do_eval", "without eval_strategy a run does not evaluate: steps or epoch")
    if strategy == "no":
        return
    put("do_eval", True, key)
    put("eval_dataset.batch_size", keys.per_device_eval_batch_size, "per_device_eval_batch_size")
    steps = keys.eval_steps or keys.logging_steps
    if strategy == "steps" and steps % 1:
        translation.refuse("eval_steps", f"{steps:g} is not supported: write a number of steps")
    put("eval_step_interval", int(steps) if strategy == "steps" else -1, "eval_steps")
    put("eval_epoch_interval", 1 if strategy == "epoch" else -1, key)


def _processes(translation: Translation) -> None:
    keys = translation.keys
    if keys.deepspeed:
        translation.put("strategy", "deepspeed", "deepspeed")
        translation.put("deepspeed", keys.deepspeed, "deepspeed")
    if keys.fsdp:
        words = keys.fsdp if isinstance(keys.fsdp, list) else str(keys.fsdp).split()
        if "full_shard" not in words or "offload" in words:
            translation.refuse("fsdp", f"{shown(keys.fsdp)} is not supported: full_shard is what is built")
        translation.put("strategy", "fsdp", "fsdp")
