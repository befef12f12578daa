"""Keys that were written and have no meaning here: never silent."""

from collections.abc import Iterator
from typing import NamedTuple

from msft.config import semi_auto
from msft.config.block import Block
from msft.config.markers import OnlyOn, Unused
from msft.config.schema import Recipe
from msft.config.schema_train import CheckpointMonitor, OtherCallback
from msft.config.yaml_lines import Document, Keys, Place, dotted


class Ignored(NamedTuple):
    """A key without meaning here: where it stands, its dotted path, and why it does nothing."""

    place: Place
    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.place.text}: {self.path}: {self.why}"


def ignored_keys(recipe: Recipe, document: Document) -> list[Ignored]:
    """Return what was written and is not used, in the order of the file and the command line."""
    found = [*_marked(recipe, recipe), *_outvoted(recipe)]
    ignored = [Ignored(document.place(path, of_key=True), dotted(path), why) for path, why in found]
    return sorted(ignored, key=lambda entry: (entry.place.order, entry.path))


def ignored_lines(recipe: Recipe) -> list[str]:
    """Return what is ignored for the console: a headline, then one line a reason with the keys and their lines."""
    reasons: dict[str, list[str]] = {}
    for entry in recipe.ignored:
        where = entry.place.text.rsplit(":", 1)[-1]
        reasons.setdefault(entry.why, []).append(f"{entry.path} ({where})")
    read = f"{recipe.name}: read as a file of {recipe.toolkit}; recipe.yaml in output_dir says what it means here"
    lines = [f"  {', '.join(keys)}: {why}" for why, keys in reasons.items()]
    what = "do nothing, or something else, here" if recipe.toolkit else "do nothing here"
    head = f"{recipe.name}: {len(recipe.ignored)} keys {what} (line numbers in brackets):"
    return [*([read] if recipe.toolkit else []), *([head, *lines] if lines else [])]


def _marked(recipe: Recipe, block: Block, path: Keys = ()) -> Iterator[tuple[Keys, str]]:
    if isinstance(block, OtherCallback):
        yield path, block.WHY
        return
    for name in block.model_fields_set:
        field = type(block).model_fields[name]
        inner, value = (*path, field.alias or name), getattr(block, name)
        for mark in field.metadata:
            if isinstance(mark, Unused):
                yield inner, mark.why
            if isinstance(mark, OnlyOn) and mark.backend != recipe.backend and value != field.default:
                yield inner, f"it is for backend {mark.backend}; {mark.why}"
        for index, entry in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(entry, Block):
                yield from _marked(recipe, entry, (*inner, index) if isinstance(value, list) else inner)


def _outvoted(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    """Keys that lose against another one that says the same thing."""
    if recipe.deepspeed is not None and recipe.backend == "torch" and recipe.strategy != "deepspeed":
        yield ("deepspeed",), f"it is for strategy deepspeed, here it is {recipe.strategy}"
    if recipe.strategy == "deepspeed" and recipe.backend == "torch" and recipe.run_mode == "eval":
        for name in ["strategy"] + ["deepspeed"] * (recipe.deepspeed is not None):
            yield (name,), "DeepSpeed is for training: run_mode eval shares the model out as fsdp does"
    for name in ("train_dataset", "eval_dataset"):
        loader = getattr(recipe, name).data_loader
        if loader.raw and (loader.dataset_dir or loader.dataset_files):
            yield (name, "data_loader", "raw"), "data_loader names a MindRecord file, which wins"
    runner, schedule, config = recipe.runner_config, recipe.lr_schedule, recipe.model.config
    if runner.batch_size and recipe.train_dataset.batch_size not in (None, runner.batch_size):
        yield ("train_dataset", "batch_size"), f"runner_config.batch_size ({runner.batch_size}) wins"
    if schedule.learning_rate is not None and recipe.optimizer.learning_rate not in (None, schedule.learning_rate):
        yield ("optimizer", "learning_rate"), f"lr_schedule.learning_rate ({schedule.learning_rate:g}) wins"
    if schedule.warmup_ratio is not None:
        for name in ("warmup_steps", "warmup_epochs"):
            if getattr(schedule, name):
                yield ("lr_schedule", name), "lr_schedule.warmup_ratio wins"
    for index, callback in enumerate(recipe.callbacks):
        if isinstance(callback, CheckpointMonitor) and "prefix" in callback.model_fields_set:
            if not callback.integrated_save:
                yield ("callbacks", index, "prefix"), "it names the CKPTs of integrated_save, which is off"
    shared = recipe.parallel_config
    if shared.micro_batch_num > 1 and shared.pipeline_stage == 1:
        why = "it counts with pipeline_stage above 1; without, micro-batches are set by gradient_accumulation_steps"
        yield ("parallel_config", "micro_batch_num"), why
    if recipe.backend == "mindspore" and recipe.parallel.parallel_mode == 1 and not recipe.use_parallel:
        yield ("parallel", "parallel_mode"), "it is for several processes (use_parallel: True)"
    if semi_auto.is_asked(recipe) and recipe.train_dataset.padding not in (None, "max_length"):
        yield ("train_dataset", "padding"), "parallel_mode 1 compiles for one length: rows are filled up"
    if recipe.backend == "mindspore" and recipe.device and recipe.context.device_target:
        yield ("context", "device_target"), f"device ({recipe.device}) wins"
    if config and config.checkpoint_name_or_path and recipe.load_checkpoint:
        yield ("model", "model_config", "checkpoint_name_or_path"), "load_checkpoint wins"
    if recipe.src_strategy_path_or_dir and not recipe.load_checkpoint:
        yield ("src_strategy_path_or_dir",), "it joins the slices of load_checkpoint, which is not set"
