"""What follows from a recipe: small pure functions, in the contract's types where it has them.

The contract (numpy) and the model families are imported inside the functions: a wrong recipe is reported
without them.
"""

import json
from os.path import exists
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msft.config.schema import Recipe
from msft.config.schema_data import Dataset
from msft.config.schema_model import ModelConfig, ModelKeys
from msft.config.schema_train import CheckpointMonitor, LossMonitor, ScaleCell
from msft.errors import InputError

if TYPE_CHECKING:
    from msft.backend.contract import LossScale, Optimizer, Precision, Runtime, Sampling, Tuning
    from msft.models.spec import ModelSpec


class Schedule(NamedTuple):
    """The learning rate; `kind` is cosine, linear or constant; `total_steps` None is the length of the run.

    Warm-up by `warmup_ratio` (of the total, rounded up or down), else by `warmup_epochs`, else by `warmup_steps`.
    """

    kind: str
    learning_rate: float
    lr_end: float
    warmup_ratio: float | None
    warmup_epochs: float | None
    warmup_steps: int
    warmup_start: float
    total_steps: int | None
    num_cycles: float
    warmup_round_up: bool = False


class Saving(NamedTuple):
    """Checkpoints: every `every_steps` optimizer steps, the newest `keep` stay.

    `background` writes while steps go on. `ckpt` writes each as MindFormers' CKPT too, under names from `prefix`.
    """

    every_steps: int
    keep: int
    background: bool = True
    ckpt: bool = False
    prefix: str = "CKP"


class Evaluation(NamedTuple):
    """Evaluation during training, by steps and by epochs (None = not by this)."""

    every_steps: int | None
    every_epochs: int | None


def model_keys(recipe: Recipe) -> ModelKeys:
    """Return the block with precision, adapters and generation: `model.model_config`, or `model` itself."""
    return recipe.model.config or recipe.model


def device(recipe: Recipe) -> str:
    """Return what the recipe asks for: auto, cpu, cuda or npu."""
    if recipe.device:
        return recipe.device
    targets = {"Ascend": "npu", "CPU": "cpu", "GPU": "cuda"}
    if recipe.backend == "mindspore" and recipe.context.device_target:
        return targets[recipe.context.device_target]
    return "auto"


def seq_length(recipe: Recipe) -> int:
    """Return the longest row in tokens that the model sees."""
    return model_keys(recipe).seq_length


def micro_batch_size(recipe: Recipe) -> int:
    """Return the rows of one process in one micro-batch; `runner_config.batch_size` wins (MindFormers)."""
    return recipe.runner_config.batch_size or recipe.train_dataset.batch_size or 1


def gradient_accumulation(recipe: Recipe, pipeline: int = 1) -> int:
    """Return the micro-batches of one optimizer step (MindFormers' interleaved micro-batches count as such).

    With more than one `pipeline` stage those of `parallel_config.micro_batch_num` count too (MindFormers).
    """
    in_pipeline = recipe.parallel_config.micro_batch_num if pipeline > 1 else 1
    return recipe.runner_config.gradient_accumulation_steps * recipe.micro_batch_interleave_num * in_pipeline


def global_batch_size(recipe: Recipe, processes: int) -> int:
    """Return the rows of one optimizer step over all micro-batches and processes."""
    return micro_batch_size(recipe) * gradient_accumulation(recipe) * processes


def eval_batch_size(recipe: Recipe) -> int:
    """Return the rows of one process in one evaluation batch."""
    return recipe.eval_dataset.batch_size or micro_batch_size(recipe)


def padding(block: Dataset) -> str:
    """Return how the rows of a batch are made equally long: by default to the next bucket, packed rows to the longest.

    Packed rows are full but for a percent or two, so one length costs nothing, and MindSpore compiles for it once.
    """
    return block.padding or ("max_length" if block.packing else "bucket")


def epochs(recipe: Recipe) -> int:
    """Return how often every row is seen; `train_dataset.repeat` multiplies the epochs."""
    return recipe.runner_config.epochs * recipe.train_dataset.repeat


def stop_step(recipe: Recipe) -> int | None:
    """Return the optimizer step after which the run ends, if the recipe ends it before its epochs."""
    return recipe.runner_config.stop_step or None


def max_skipped_steps(recipe: Recipe) -> int:
    """Return after how many steps in a row that could not be taken the run fails."""
    return recipe.runner_config.max_skipped_steps


def optimizer(recipe: Recipe) -> "Optimizer":
    """Return the optimizer; only AdamW corrects the bias of its moments, MindFormers' two kinds do not."""
    from msft.backend.contract import Optimizer

    block = recipe.optimizer
    torch_like = block.type == "AdamW"
    beta1, beta2 = block.betas or (block.beta1, block.beta2)
    return Optimizer(
        beta1=beta1,
        beta2=beta2,
        eps=block.eps or (1e-8 if torch_like else 1e-6),
        weight_decay=block.weight_decay,
        bias_correction=torch_like,
        decay_norms_and_biases=block.decay_norms_and_biases,
    )


def learning_rate(recipe: Recipe) -> float:
    """Return the peak rate: the schedule's, the optimizer's, or 1e-4 for adapters and 1e-5 for all weights."""
    for rate in (recipe.lr_schedule.learning_rate, recipe.optimizer.learning_rate):
        if rate is not None:
            return rate
    return 1e-4 if model_keys(recipe).pet_config else 1e-5


def schedule(recipe: Recipe) -> Schedule:
    """Return the learning-rate schedule; without `lr_schedule` the rate is constant (MindFormers)."""
    block = recipe.lr_schedule
    kinds = {"CosineWithWarmUpLR": "cosine", "LinearWithWarmUpLR": "linear", "ConstantWarmUpLR": "constant"}
    return Schedule(
        kind=kinds[block.type],
        learning_rate=learning_rate(recipe),
        lr_end=block.lr_end,
        warmup_ratio=block.warmup_ratio,
        warmup_epochs=block.warmup_epochs,
        warmup_steps=block.warmup_steps,
        warmup_start=block.warmup_lr_init,
        total_steps=None if block.total_steps < 1 else block.total_steps,
        num_cycles=block.num_cycles,
        warmup_round_up=block.warmup_round_up,
    )


def max_grad_norm(recipe: Recipe) -> float | None:
    """Return the norm that gradients are clipped to, or None for no clipping."""
    wrapper = recipe.runner_wrapper
    clip = wrapper.use_clip_grad
    if clip is None:
        clip = wrapper.type != "MFTrainOneStepCell"
    return wrapper.max_grad_norm if clip else None


def loss_scale(recipe: Recipe, device: str) -> "LossScale":
    """Return the loss scale; unset, it is dynamic from 65536 when matrix products run in float16, else 1."""
    from msft.backend.contract import LossScale

    scale = recipe.runner_wrapper.scale_sense
    if scale is None:
        scale = ScaleCell() if precision(recipe, device).compute == "float16" else 1.0
    if isinstance(scale, float):
        return LossScale(initial=scale)
    window = scale.scale_window if scale.type == "DynamicLossScaleUpdateCell" else 0
    return LossScale(initial=scale.loss_scale_value, factor=scale.scale_factor, window=window)


def precision(recipe: Recipe, device: str) -> "Precision":
    """Return the dtypes; unset, products and frozen weights are float32 on cpu and bfloat16 elsewhere."""
    from msft.backend.contract import Precision

    keys = model_keys(recipe)
    compute = keys.compute_dtype or ("float32" if device == "cpu" else "bfloat16")
    return Precision(
        parameters=keys.param_init_type or compute,
        compute=compute,
        softmax=keys.softmax_compute_type or "float32",
        norm=keys.layernorm_compute_type or "float32",
        rotary=keys.rotary_dtype or "float32",
    )


def recompute(recipe: Recipe) -> bool:
    """Return whether blocks drop their activations; a number of layers above 0 counts as all of them."""
    layers = recipe.recompute_config.recompute
    return any(layers) if isinstance(layers, list) else bool(layers)


def strategy(recipe: Recipe) -> str:
    """Return what several processes share out: rows alone (ddp), or the model too (fsdp, deepspeed).

    DeepSpeed is built around an optimizer; what only evaluates is shared out by fsdp.
    """
    if recipe.backend != "torch":
        return "ddp"
    return "fsdp" if recipe.strategy == "deepspeed" and recipe.run_mode == "eval" else recipe.strategy


def runtime(recipe: Recipe, device: str, parallel: bool) -> "Runtime":
    """Return where and how the model runs; `device` is the one that was picked."""
    from msft.backend.contract import Runtime

    return Runtime(
        device=device,
        seed=recipe.seed,
        precision=precision(recipe, device),
        optimizer=optimizer(recipe),
        loss_scale=loss_scale(recipe, device),
        max_grad_norm=max_grad_norm(recipe),
        recompute=recompute(recipe),
        shard_optimizer=parallel and recipe.parallel.enable_parallel_optimizer and strategy(recipe) == "ddp",
        compile=recipe.backend == "torch" and recipe.torch_compile,
        parallel=parallel,
        strategy=strategy(recipe),
        balance=model_keys(recipe).moe_aux_loss_coef or 0.0,
    )


def log_every(recipe: Recipe) -> int:
    """Return every how many steps the console shows one."""
    return next((entry.per_print_times for entry in recipe.callbacks if isinstance(entry, LossMonitor)), 1)


def saving(recipe: Recipe) -> Saving | None:
    """Return when and how checkpoints are written, or None when `callbacks` has no CheckpointMonitor."""
    monitor = next((entry for entry in recipe.callbacks if isinstance(entry, CheckpointMonitor)), None)
    return _saving(monitor) if monitor else None


def saving_when_stopped() -> Saving:
    """Return how a run without CheckpointMonitor saves when it is told to stop: as one with its defaults."""
    return _saving(CheckpointMonitor(type="CheckpointMonitor"))


def _saving(monitor: CheckpointMonitor) -> Saving:
    return Saving(
        every_steps=monitor.save_checkpoint_steps,
        keep=monitor.keep_checkpoint_max,
        background=monitor.async_save,
        ckpt=monitor.integrated_save,
        prefix=monitor.prefix or "CKP",
    )


def evaluation(recipe: Recipe) -> Evaluation | None:
    """Return when the run evaluates, or None when `do_eval` is False."""
    if not recipe.do_eval:
        return None
    steps, epochs = recipe.eval_step_interval, recipe.eval_epoch_interval
    return Evaluation(steps if steps > 0 else None, epochs if epochs > 0 else None)


def weights(recipe: Recipe) -> str | None:
    """Return the path that weights are read from, or None for random ones.

    `load_checkpoint`, else `model.pretrained`, else `checkpoint_name_or_path` where it is a path that exists
    (MindFormers' model names are not downloaded).
    """
    named = recipe.model.config.checkpoint_name_or_path if recipe.model.config else ""
    return recipe.load_checkpoint or recipe.model.pretrained or (named if exists(named) else None)


def tokenizer(recipe: Recipe) -> str | None:
    """Return the tokenizer's file or folder, if the recipe names one."""
    return recipe.processor.tokenizer.vocab_file or recipe.model.pretrained or None


def model_spec(recipe: Recipe) -> "ModelSpec":
    """Return the model's sizes from `model_config`, or from the config.json of `model.pretrained`."""
    from msft.models.families import spec_from_hf
    from msft.models.llama import hf_config_from_mindformers

    if recipe.model.config:
        where = recipe.source.get("model.model_config", recipe.name)
        return spec_from_hf(hf_config_from_mindformers(_sizes(recipe.model.config)), f"{where}: model.model_config")
    path = Path(recipe.model.pretrained, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is no JSON") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: the top level must be an object")
    return spec_from_hf(config, str(path))


def _sizes(config: ModelConfig) -> dict:
    shared = set(ModelKeys.model_fields) - {"seq_length"}
    return config.model_dump(exclude=shared, exclude_none=True)


def tuning(recipe: Recipe, spec: "ModelSpec") -> "Tuning":
    """Return what is trained: every parameter, or adapters and what `freeze_exclude` sets free.

    Raises InputError for patterns that match nothing.
    """
    from msft.backend.contract import Lora, Tuning
    from msft.models.targets import lora_modules, trained_adapters, tuned_parameters

    pet = model_keys(recipe).pet_config
    at = "model.model_config.pet_config" if recipe.model.config else "model.pet_config"
    if pet is None:
        return Tuning(parameters=tuned_parameters(spec, lora=False))

    def where(key: str) -> str:
        return f"{recipe.source.get(f'{at}.{key}', recipe.name)}: {at}.{key}"

    include, exclude = pet.freeze_include, pet.freeze_exclude
    places = (where("freeze_include"), where("freeze_exclude"))
    parameters = tuned_parameters(spec, include, exclude, lora=True, where=places)
    modules = lora_modules(pet.target_modules, spec, pet.exclude_layers, where("target_modules"))
    modules = trained_adapters(modules, spec, include, exclude, places[0])
    return Tuning(parameters, Lora(pet.lora_rank, pet.lora_alpha, pet.lora_dropout, modules))


def sampling(recipe: Recipe, prompt_length: int = 0) -> "Sampling":
    """Return how tokens are chosen; `max_decode_length` counts the prompt, `max_new_tokens` does not and wins."""
    from msft.backend.contract import Sampling

    keys = model_keys(recipe)
    room = max(1, keys.max_decode_length - prompt_length) if keys.max_decode_length else 128
    return Sampling(
        max_new_tokens=keys.max_new_tokens or room,
        temperature=keys.temperature if keys.do_sample else 0.0,
        top_k=keys.top_k,
        top_p=keys.top_p,
        seed=recipe.seed,
    )
