"""Rules between keys, and what can only be known when a run starts: paths on disk, the device."""

from collections.abc import Iterator
from os.path import exists, isfile, join

from msft.config.block import Block
from msft.config.derive import strategy, weights
from msft.config.markers import Refused, shown
from msft.config.schema import Recipe
from msft.config.schema_model import ModelKeys
from msft.config.yaml_lines import Document, Keys, Problem, dotted
from msft.errors import InputError

PRECISION_KEYS = (
    "compute_dtype",
    "layernorm_compute_type",
    "softmax_compute_type",
    "rotary_dtype",
    "param_init_type",
)

_HALF_ON_CPU = {
    "bfloat16": "MindSpore has no bfloat16 matrix product on CPU",
    "float16": "MindSpore's float16 cross-entropy gives NaN on CPU",
}


def cross_checks(recipe: Recipe, document: Document) -> list[tuple[Keys, Problem]]:
    """Return what is wrong between keys whose types and ranges are right."""
    found = [*_refused(recipe), *_model(recipe), *_schedule(recipe), *_callbacks(recipe), *_optimizer(recipe)]
    found += [*_length_grouping(recipe), *_strategy(recipe), *_held_out(recipe)]
    return [(path, Problem(document.place(path), dotted(path), message)) for path, message in found]


def _refused(block: Block, path: Keys = ()) -> Iterator[tuple[Keys, str]]:
    for name in block.model_fields_set:
        field = type(block).model_fields.get(name)
        inner, value = (*path, field.alias or name if field else name), getattr(block, name)
        for mark in field.metadata if field else ():
            if isinstance(mark, Refused) and value is not None and value not in mark.neutral:
                yield inner, f"{shown(value)} is not supported: {mark.why}"
        for index, entry in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(entry, Block):
                yield from _refused(entry, (*inner, index) if isinstance(value, list) else inner)


def _model(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    model, config = recipe.model, recipe.model.config
    if not model.pretrained and config is None:
        yield ("model",), "needs pretrained (a Hugging Face folder) or model_config (sizes)"
    if model.pretrained and config is not None:
        yield ("model", "pretrained"), "stands beside model_config: sizes come from one of the two"
    if config is None:
        return
    for name in ModelKeys.model_fields:
        if name in model.model_fields_set and not model.pretrained:
            yield ("model", name), f"belongs in model.model_config ('model.model_config.{name}')"
    at: Keys = ("model", "model_config")
    if config.hidden_size % config.num_heads:
        message = f"{config.num_heads} heads do not divide hidden_size ({config.hidden_size})"
        yield (*at, "num_heads"), message
    elif config.hidden_size // config.num_heads % 2:
        message = f"{config.num_heads} heads make heads of odd size ({config.hidden_size // config.num_heads})"
        yield (*at, "num_heads"), f"{message}, rotary embedding needs an even one"
    if config.n_kv_heads and config.num_heads % config.n_kv_heads:
        yield (*at, "n_kv_heads"), f"{config.n_kv_heads} key-value heads do not divide num_heads ({config.num_heads})"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name) >= config.vocab_size:
            yield (*at, name), f"{getattr(config, name)} is outside the vocabulary ({config.vocab_size} tokens)"


def _schedule(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    schedule = recipe.lr_schedule
    if 0 <= schedule.total_steps < schedule.warmup_steps and schedule.warmup_ratio is None:
        message = f"{schedule.warmup_steps} warm-up steps do not fit into total_steps ({schedule.total_steps})"
        yield ("lr_schedule", "warmup_steps"), message
    for name in ("lr_end", "warmup_lr_init"):
        if schedule.learning_rate is not None and getattr(schedule, name) > schedule.learning_rate:
            value = getattr(schedule, name)
            yield ("lr_schedule", name), f"{value:g} is above the learning rate ({schedule.learning_rate:g})"


def _optimizer(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    optimizer = recipe.optimizer
    if optimizer.betas and {"beta1", "beta2"} & optimizer.model_fields_set:
        yield ("optimizer", "betas"), "stands beside beta1 or beta2: write one of the two forms"


def _length_grouping(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    block, at = recipe.train_dataset, ("train_dataset", "length_grouping")
    if not block.length_grouping:
        return
    if block.packing:
        yield at, "stands beside packing, which fills every row: write one of the two"
    if block.padding == "max_length":
        yield at, "stands beside padding max_length, which makes all rows equally long: write bucket or longest"
    if not block.data_loader.shuffle:
        yield at, "groups the rows of a shuffled order, but data_loader.shuffle is False"


def _strategy(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    asked, kind = recipe.parallel_config, strategy(recipe)
    if kind != "ddp" and asked.pipeline_stage > 1:
        beside = f"stands beside parallel_config.pipeline_stage {asked.pipeline_stage}"
        yield ("strategy",), f"{kind} {beside}: write one of the two"
    if kind == "deepspeed" and asked.model_parallel > 1:
        beside = f"stands beside parallel_config.model_parallel {asked.model_parallel}"
        yield ("strategy",), f"deepspeed {beside}: write one of the two; fsdp and ddp go with it"
    if kind == "deepspeed" and asked.context_parallel > 1:
        beside = f"stands beside parallel_config.context_parallel {asked.context_parallel}"
        yield ("strategy",), f"deepspeed {beside}, but its processes have rows of their own; fsdp and ddp share them"


def _held_out(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    loader, at = recipe.eval_dataset.data_loader, ("eval_dataset", "data_loader", "held_out")
    if loader.held_out >= 1 and loader.held_out % 1:
        yield at, f"must be a share below 1 or a whole number of rows, not {loader.held_out:g}"
    if loader.held_out and (loader.dataset_dir or loader.dataset_files or loader.raw):
        yield at, "stands beside data for evaluation: write one of the two"


def _callbacks(recipe: Recipe) -> Iterator[tuple[Keys, str]]:
    seen: dict[str, int] = {}
    for index, callback in enumerate(recipe.callbacks):
        if callback.type in seen:
            yield ("callbacks", index), f"{callback.type} stands twice (entries {seen[callback.type]} and {index})"
        seen.setdefault(callback.type, index)


def check_paths(recipe: Recipe) -> None:
    """Raise InputError naming every file and folder that this run needs and that is not there."""
    problems = [
        f"{recipe.source.get(path, recipe.name)}: {path}: {message}"
        for path, message in (*_missing_data(recipe), *_missing_weights(recipe))
    ]
    if problems:
        raise InputError(*problems)


def _missing_data(recipe: Recipe) -> Iterator[tuple[str, str]]:
    wanted = []
    if recipe.run_mode in ("train", "finetune"):
        wanted.append(("train_dataset", recipe.train_dataset, "--train_dataset_dir"))
    if recipe.run_mode == "eval" or recipe.do_eval and wanted and not recipe.eval_dataset.data_loader.held_out:
        wanted.append(("eval_dataset", recipe.eval_dataset, "--eval_dataset_dir"))
    for name, dataset, flag in wanted:
        loader, key = dataset.data_loader, f"{name}.data_loader.dataset_dir"
        if loader.raw and not loader.dataset_dir and not loader.dataset_files:
            for index, file in enumerate(loader.raw.files):
                yield from _missing(f"{name}.data_loader.raw.files.{index}.path", file.path)
        elif not loader.dataset_dir and not loader.dataset_files:
            yield key, f"no data is named (give a MindRecord file or folder here or with {flag})"
        elif loader.dataset_dir:
            yield from _missing(key, loader.dataset_dir)
        else:
            for index, file in enumerate(loader.dataset_files):
                yield from _missing(f"{name}.data_loader.dataset_files.{index}", file)
    if recipe.run_mode == "predict" and not recipe.predict_data:
        yield "predict_data", "no prompts are named (give texts, or a file of them, with --predict_data)"


def _missing_weights(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.model.pretrained and not isfile(join(recipe.model.pretrained, "config.json")):
        folder = recipe.model.pretrained
        fetch = (
            "" if exists(folder) or folder.count("/") != 1 else f"; to fetch it: hf download {folder} --local-dir DIR"
        )
        yield "model.pretrained", f"{folder} is no Hugging Face folder (it has no config.json){fetch}"
    if recipe.load_checkpoint:
        yield from _missing("load_checkpoint", recipe.load_checkpoint)
        if recipe.src_strategy_path_or_dir:
            yield from _missing("src_strategy_path_or_dir", recipe.src_strategy_path_or_dir)
    elif recipe.run_mode != "train" and not recipe.resume_training and not weights(recipe):
        yield "load_checkpoint", f"run_mode {recipe.run_mode} needs weights (name them here or with --load_checkpoint)"
    if recipe.processor.tokenizer.vocab_file:
        yield from _missing("processor.tokenizer.vocab_file", recipe.processor.tokenizer.vocab_file)


def _missing(key: str, path: str) -> Iterator[tuple[str, str]]:
    if not exists(path):
        yield key, f"{path} is a placeholder: write the real path" if "{" in path else f"{path} does not exist"


def check_device(recipe: Recipe, device: str) -> None:
    """Raise InputError for dtypes that `device` (cpu, cuda, npu) cannot run: on MindSpore's CPU, all but float32."""
    if recipe.backend != "mindspore" or device != "cpu":
        return
    keys = recipe.model.config or recipe.model
    at = "model.model_config" if recipe.model.config else "model"
    asked = {f"{at}.{name}": getattr(keys, name) for name in PRECISION_KEYS}
    half = {path: dtype for path, dtype in asked.items() if dtype not in (None, "float32")}
    problems = [
        f"{recipe.source.get(path, recipe.name)}: {path}: {_HALF_ON_CPU[dtype]}; use float32 (--{path} float32), "
        "another device, or backend torch"
        for path, dtype in half.items()
    ]
    if problems:
        raise InputError(*problems)
