"""The whole DeepSpeed configuration of a run: what the recipe says, with a user's own keys, and no default left open.

DeepSpeed fills in what a configuration leaves out (it clips gradients at 1.0, for one), so every key is written.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from msft.config import derive
from msft.config.deepspeed_keys import FIXED, RATES, REFUSED, TOP_LEVEL
from msft.config.markers import shown
from msft.config.schema import Recipe
from msft.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from msft.models.spec import ModelSpec

DEFAULT_STAGE = 2
AUTO = "auto"


class Said(NamedTuple):
    """A value that the recipe decides, and the recipe's key for it."""

    value: Any
    by: str


def check(recipe: Recipe, spec: "ModelSpec", workers: int) -> None:
    """Raise InputError where a recipe asks for DeepSpeed and cannot have it, or contradicts its configuration."""
    if derive.strategy(recipe) != "deepspeed":
        return
    whole(recipe, spec, workers, derive.device(recipe))
    # A single process does without it.
    if workers > 1 and importlib.util.find_spec("deepspeed") is None:
        where = recipe.source.get("strategy", recipe.name)
        raise InputError(f"{where}: strategy deepspeed needs deepspeed: pip install 'msft[deepspeed]'")


def whole(recipe: Recipe, spec: "ModelSpec", ranks: int, device: str) -> dict[str, Any]:
    """Return the configuration for so many processes on a device (auto: not known yet, dtypes are not checked).

    A user's own keys stand where they contradict nothing, their "auto" is what the recipe says (buckets: what
    transformers fills in). Raises InputError with every contradiction, naming both places.
    """
    own = _own(recipe)
    ours, decided = _configuration(recipe, own, device), _decided(recipe, ranks, device)
    problems = [*_no_blocks(ours | {"scheduler": {"params": {}}}, own)]
    # What follows looks into the blocks.
    _raise(recipe, problems)
    problems += [*_unknown(own), *_scheduler(recipe, own)]
    for key, said in decided.items():
        if (found := _get(own, key)) not in (None, AUTO) and not _same(found, said.value):
            here = said.by if key in FIXED else _place(recipe, said.by)
            problems.append((key, f'is {shown(found)}, but {here} asks for {shown(said.value)}; "auto" takes that'))
    stage = _get(own, "zero_optimization.stage")
    if stage not in (None, 1, 2, 3) or isinstance(stage, bool):
        problems.append(("zero_optimization.stage", f"is {shown(stage)}, it must be 1, 2 or 3 (0 is strategy ddp)"))
    merged = _merged(ours | {"scheduler": None}, {**own, "scheduler": None})
    del merged["scheduler"]
    for key, said in decided.items():
        _put(merged, key, said.value)
    _fill_buckets(merged, spec.hidden_size)
    problems += [(key, '"auto" is not known for this key') for key in _autos(merged)]
    _raise(recipe, problems)
    return merged


def _raise(recipe: Recipe, problems: list[tuple[str, str]]) -> None:
    if problems:
        raise InputError(*(f"{_where(recipe, key)}: {key}: {message}" for key, message in problems))


def _no_blocks(ours: dict, own: dict, path: str = "") -> Iterator[tuple[str, str]]:
    """Values that stand where keys belong; `scheduler` alone may be empty."""
    for key, value in own.items():
        inner, at = ours.get(key), f"{path}{key}"
        if isinstance(inner, dict) and isinstance(value, dict):
            yield from _no_blocks(inner, value, f"{at}.")
        elif isinstance(inner, dict) and (value is not None or not at.startswith("scheduler")):
            yield at, f"is {shown(value)}, it must be a block of keys"


def _own(recipe: Recipe) -> dict[str, Any]:
    """The user's own configuration, {} without one."""
    if not isinstance(recipe.deepspeed, str):
        return recipe.deepspeed or {}
    where = f"{recipe.source.get('deepspeed', recipe.name)}: deepspeed: {recipe.deepspeed}"

    def once(pairs: list) -> dict:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{where}: the key '{twice}' stands twice")
        return dict(pairs)

    try:
        found = json.loads(Path(recipe.deepspeed).read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{where}: is no JSON") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: the top level must be an object")
    return found


def _configuration(recipe: Recipe, own: dict, device: str) -> dict[str, Any]:
    """What is written beside what the recipe decides."""
    stage = _get(own, "zero_optimization.stage") or DEFAULT_STAGE
    offloaded = _get(own, "zero_optimization.offload_optimizer.device") not in (None, "none")
    zero = {
        "stage": stage,
        "overlap_comm": device != "cpu",
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": AUTO,
        "allgather_partitions": True,
        "allgather_bucket_size": 500_000_000,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
        "load_from_fp32_weights": True,
        "sub_group_size": 1_000_000_000,
        "offload_optimizer": {"device": "none", "pin_memory": offloaded},
        "offload_param": {"device": "none", "pin_memory": False},
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": AUTO,
            "stage3_param_persistence_threshold": AUTO,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    # DeepSpeed's own kernels are built by a compiler at the first run; only offload and MindFormers' form need them.
    own_kernel = offloaded or not derive.optimizer(recipe).bias_correction
    return {
        "optimizer": {"type": "AdamW", "params": {"torch_adam": not own_kernel}},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": offloaded,
        "fp16": {"auto_cast": False, "hysteresis": 1, "consecutive_hysteresis": False, "min_loss_scale": 1},
        "bf16": {"immediate_grad_update": False, "check_grad_overflow": True},
        "torch_autocast": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "dataloader_drop_last": False,
        "disable_allgather": False,
        "dump_state": False,
        "memory_breakdown": False,
        "wall_clock_breakdown": False,
        "steps_per_print": sys.maxsize,
    }


def _decided(recipe: Recipe, ranks: int, device: str) -> dict[str, Said]:
    """What the recipe decides, by DeepSpeed's keys."""
    optimizer, clip = derive.optimizer(recipe), derive.max_grad_norm(recipe)
    rows = "runner_config.batch_size" if recipe.runner_config.batch_size else "train_dataset.batch_size"
    rate = "lr_schedule" if recipe.lr_schedule.learning_rate is not None else "optimizer"
    rates = {"lr": derive.learning_rate(recipe), "betas": [optimizer.beta1, optimizer.beta2]}
    rates |= {"eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
    found = {
        "train_batch_size": Said(
            derive.global_batch_size(recipe, ranks), f"{rows} x gradient_accumulation_steps x {ranks} processes"
        ),
        "train_micro_batch_size_per_gpu": Said(derive.micro_batch_size(recipe), rows),
        "gradient_accumulation_steps": Said(
            derive.gradient_accumulation(recipe), "runner_config.gradient_accumulation_steps"
        ),
        "gradient_clipping": Said(clip or 0.0, f"runner_wrapper.{'max_grad_norm' if clip else 'use_clip_grad'}"),
        **{f"optimizer.params.{name}": Said(value, f"optimizer.{name}") for name, value in rates.items()},
        **{key: Said(value, why) for key, (value, why) in FIXED.items()},
    }
    if not recipe.optimizer.betas:
        found["optimizer.params.betas"] = Said(rates["betas"], "optimizer.beta1")
    found["optimizer.params.lr"] = Said(rates["lr"], f"{rate}.learning_rate")
    found |= _dtypes(recipe, device)
    if not optimizer.bias_correction:
        found["optimizer.params.bias_correction"] = Said(False, "optimizer.type")
    return found


def _dtypes(recipe: Recipe, device: str) -> dict[str, Said]:
    keys = "model.model_config" if recipe.model.config else "model"
    named = derive.model_keys(recipe).compute_dtype
    if device == "auto" and named is None:
        return {}
    compute, by = derive.precision(recipe, device).compute, f"{keys}.compute_dtype"
    found = {"fp16.enabled": Said(compute == "float16", by), "bf16.enabled": Said(compute == "bfloat16", by)}
    scale = derive.loss_scale(recipe, device)
    if compute == "float16":
        by = "runner_wrapper.scale_sense"
        found["fp16.loss_scale"] = Said(0 if scale.window else scale.initial, by)
        found["fp16.initial_scale_power"] = Said(int(log2(scale.initial)), by)
        found["fp16.loss_scale_window"] = Said(scale.window or 1000, by)
    return found


def _unknown(own: dict) -> Iterator[tuple[str, str]]:
    """DeepSpeed says nothing about keys that it does not know."""
    for key in own:
        if key in REFUSED:
            yield key, "is not taken: it trains otherwise than the recipe says, or does what msft does itself"
        elif key not in TOP_LEVEL:
            yield key, f"DeepSpeed has no such key{did_you_mean(str(key), TOP_LEVEL)}"
    kind = _get(own, "optimizer.type")
    if kind is not None and str(kind).lower() != "adamw":
        yield "optimizer.type", f"is {shown(kind)}, but the recipe's optimizers are AdamW here"


def _scheduler(recipe: Recipe, own: dict) -> Iterator[tuple[str, str]]:
    """The loop sets the rate of every step: a scheduler may say the same, and is then left out."""
    block = own.get("scheduler")
    if block is None:
        return
    kind, names = derive.schedule(recipe).kind, {name: kind for kind, name in RATES.items()}
    said = block.get("type")
    if not isinstance(said, str) or names.get(said) != kind:
        here = _place(recipe, "lr_schedule.type")
        yield "scheduler.type", f"is {shown(said)}, but {here} is {kind} ({RATES[kind]}); or leave scheduler out"
        return
    for name, value in (block.get("params") or {}).items():
        if value != AUTO:
            yield f"scheduler.params.{name}", f'is {shown(value)}, but lr_schedule decides the rate: write "auto"'


def _fill_buckets(configuration: dict, hidden: int) -> None:
    """What transformers' integration fills in for "auto"."""
    values = {"reduce_bucket_size": hidden * hidden, "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden)}
    values["stage3_param_persistence_threshold"] = 10 * hidden
    zero = configuration["zero_optimization"]
    zero |= {name: value for name, value in values.items() if zero.get(name) == AUTO}


def _merged(below: dict, above: dict) -> dict:
    """`above` over `below`, block by block."""
    found = dict(below)
    for key, value in above.items():
        inner = below.get(key)
        found[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return found


def _get(block: Any, key: str) -> Any:
    for part in key.split("."):
        block = block.get(part) if isinstance(block, dict) else None
    return block


def _put(block: dict, key: str, value: Any) -> None:
    *way, last = key.split(".")
    for part in way:
        if not isinstance(block.get(part), dict):
            block[part] = {}
        block = block[part]
    block[last] = value


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, bool) or isinstance(found, bool):
        return found is wanted
    return (list(found) if isinstance(found, list | tuple) else found) == wanted


def _autos(block: dict, path: str = "") -> Iterator[str]:
    for key, value in block.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{path}{key}.")
        elif value == AUTO:
            yield f"{path}{key}"


def _place(recipe: Recipe, key: str) -> str:
    """A key of the recipe, and where it was written."""
    where = recipe.source.get(key)
    return f"{key} ({where})" if where else f"{key} ({recipe.name}, by default)"


def _where(recipe: Recipe, key: str) -> str:
    """Where a key of DeepSpeed stands: the user's JSON, or its line in the recipe."""
    if isinstance(recipe.deepspeed, str):
        return recipe.deepspeed
    return f"{recipe.source.get(f'deepspeed.{key}', recipe.source.get('deepspeed', recipe.name))}: deepspeed"
