"""Everything about a run that can be found out, and found wrong, before a framework is imported."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msft import console
from msft.backend import PACKAGES
from msft.backend.contract import Tuning
from msft.backend.plan import Plan
from msft.config import deepspeed, derive, experts, semi_auto
from msft.config.checks import check_paths
from msft.config.layout import Layout, layout
from msft.config.report import ignored_lines
from msft.config.schema import Recipe
from msft.config.schema_data import EvalDataset
from msft.data import held_out
from msft.data.dataset import RowDataset
from msft.data.tokenizer_files import has_tokenizer
from msft.errors import InputError
from msft.models.spec import ModelSpec
from msft.train import checkpoint, datasets, outputs, raw_data, sources


@dataclass(frozen=True)
class Prepared:
    """A checked recipe and what it names, opened; `resumed` is the checkpoint to go on from.

    `plan` is there where MindSpore cuts the model (parallel_mode 1).
    """

    recipe: Recipe
    spec: ModelSpec
    tuning: Tuning
    weights: sources.Weights
    train_data: RowDataset | None
    eval_data: RowDataset | None
    pad_id: int
    resumed: Path | None
    layout: Layout
    plan: Plan | None = None

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.recipe.output_dir)

    @property
    def trains(self) -> bool:
        """Whether the run changes weights."""
        return self.recipe.run_mode in ("train", "finetune")


def prepare(recipe: Recipe) -> Prepared:
    """Check and open what a recipe names, and say which of its keys do nothing.

    Raises one InputError with all problems of paths, or else of model, weights and data.
    """
    for line in ignored_lines(recipe):
        console.note(line)
    recipe = _with_eval_data(recipe)
    check_paths(recipe)
    _check_framework(recipe)
    recipe = raw_data.made(recipe, _data_blocks(recipe))
    found = _Problems()
    trains = recipe.run_mode in ("train", "finetune")
    resumed = found.of(_resumed, recipe) if trains else None
    spec = derive.model_spec(recipe)
    dealt = found.of(layout, recipe, spec, processes())
    found.of(deepspeed.check, recipe, spec, processes())
    found.of(experts.check, recipe, spec, processes())
    weights = found.of(sources.open_all, recipe, spec, resumed)
    tuning = found.of(_tuning, recipe, spec, weights, resumed) if weights else None
    pad_id = found.of(_pad_id, recipe, spec)
    train_data = found.of(_rows, recipe, "train_dataset", pad_id or 0) if trains else None
    for name in _data_blocks(recipe):
        found.of(_made_for, recipe, spec, name)
    evaluates = "eval_dataset" in _data_blocks(recipe)
    eval_data = found.of(_rows, recipe, "eval_dataset", pad_id or 0) if evaluates else None
    if trains and recipe.do_eval and recipe.eval_dataset.data_loader.held_out and train_data:
        train_data, eval_data = found.of(_split, recipe, train_data) or (None, None)
    if trains and not resumed:
        found.of(_check_output, recipe, weights)
    found.raise_any()
    plan = semi_auto.plan(recipe, spec, processes()) if semi_auto.is_asked(recipe, processes()) else None
    if plan:
        console.warn(f"{recipe.source.get(semi_auto.MODE, recipe.name)}: {semi_auto.MODE} {semi_auto.UNTRIED}")
    return Prepared(recipe, spec, tuning, weights, train_data, eval_data, pad_id, resumed, dealt, plan)


class _Problems:
    """Collects the problems of several InputErrors."""

    def __init__(self):
        self.lines: list[str] = []

    def of(self, function: Callable, *arguments):
        """Return what the function returns, or None when it raised an InputError."""
        try:
            return function(*arguments)
        except InputError as error:
            self.lines += error.problems
            return None

    def raise_any(self) -> None:
        if self.lines:
            raise InputError(*dict.fromkeys(self.lines))


def processes() -> int:
    """Return how many processes the launcher (torchrun, msrun) started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("MS_WORKER_NUM") or 1)


def launched() -> bool:
    """Whether torchrun or msrun started this process, be it the only one; msrun's scheduler must join the group too."""
    return "RANK" in os.environ or "MS_ROLE" in os.environ


def _data_blocks(recipe: Recipe) -> list[str]:
    """The dataset blocks that a run opens; rows that are held out of training are the training file's."""
    trains = recipe.run_mode in ("train", "finetune")
    evaluates = recipe.run_mode == "eval" or trains and recipe.do_eval and not recipe.eval_dataset.data_loader.held_out
    return ["train_dataset"] * trains + ["eval_dataset"] * evaluates


def _split(recipe: Recipe, data: RowDataset) -> tuple[RowDataset, RowDataset]:
    key = "eval_dataset.data_loader.held_out"
    where = f"{recipe.source.get(key, recipe.name)}: {key}"
    return held_out.split(data, recipe.eval_dataset.data_loader.held_out, recipe.seed, where)


def _with_eval_data(recipe: Recipe) -> Recipe:
    """In run_mode eval, training data is evaluated when the recipe names no evaluation data."""
    named = recipe.eval_dataset.data_loader.raw or datasets.paths_of(recipe.eval_dataset)
    named = named or not (recipe.train_dataset.data_loader.raw or datasets.paths_of(recipe.train_dataset))
    if recipe.run_mode != "eval" or named:
        return recipe
    console.note(f"{recipe.name}: eval_dataset names no data, so train_dataset is evaluated")
    left_out = {"drop_remainder": True, "length_grouping": True, "data_loader": {"shuffle"}}
    block = recipe.train_dataset.model_dump(exclude_unset=True, exclude=left_out)
    return recipe.model_copy(update={"eval_dataset": EvalDataset.model_validate(block)})


def _check_framework(recipe: Recipe) -> None:
    absent = [name for name in PACKAGES[recipe.backend] if importlib.util.find_spec(name) is None]
    if absent:
        where = recipe.source.get("backend", recipe.name)
        raise InputError(
            f"{where}: backend {recipe.backend} needs {', '.join(absent)}, not installed here: "
            f"pip install 'msft[{recipe.backend}]'"
        )


def _resumed(recipe: Recipe) -> Path | None:
    """The checkpoint that resume_training asks for; MindFormers names it in load_checkpoint."""
    asked: bool | str = recipe.resume_training
    if asked is True and recipe.load_checkpoint and (Path(recipe.load_checkpoint) / checkpoint.STATE).is_file():
        asked = recipe.load_checkpoint
    found = checkpoint.find(asked, Path(recipe.output_dir))
    if asked and found is None:
        console.note(f"resume_training: {recipe.output_dir} has no checkpoint yet, so the run starts at the beginning")
    return found


def _tuning(recipe: Recipe, spec: ModelSpec, weights: sources.Weights, resumed: Path | None) -> Tuning:
    """What is trained; a run that trains nothing only carries the adapter it was given."""
    if recipe.run_mode in ("train", "finetune"):
        tuning = derive.tuning(recipe, spec)
        if resumed is None:
            sources.check_adapter(weights, tuning.lora, recipe.name)
        return tuning
    if weights.adapter is None:
        return Tuning()
    return Tuning(lora=sources.with_alpha(weights, derive.model_keys(recipe).pet_config, recipe.name))


def _pad_id(recipe: Recipe, spec: ModelSpec) -> int:
    """The id that ends rows: what the data says, or the pretrained folder's tokenizer pads with, or model_config's."""
    from msft.data.tokenizers import open_tokenizer

    block = recipe.eval_dataset if recipe.run_mode == "eval" else recipe.train_dataset
    recorded = datasets.recorded_pad_id(block)
    if recorded is not None:
        return recorded
    folder = Path(recipe.model.pretrained) if recipe.model.pretrained else None
    if folder and has_tokenizer(folder):
        return open_tokenizer(folder).pad_id
    return max(spec.pad_token_id or 0, 0)


def _rows(recipe: Recipe, name: str, pad_id: int) -> RowDataset:
    where = recipe.source.get(f"{name}.input_columns", recipe.name)
    return datasets.open_rows(getattr(recipe, name), name, where, pad_id)


def _made_for(recipe: Recipe, spec: ModelSpec, name: str) -> None:
    where = recipe.source.get(f"{name}.data_loader.dataset_dir", recipe.name)
    start = spec.encoder.start_id if spec.encoder else None
    datasets.check_made_for(getattr(recipe, name), name, where, start)


def _check_output(recipe: Recipe, weights: sources.Weights | None) -> None:
    """Refuse inputs that lie among the earlier results that a new run sets aside."""
    inputs = {
        "load_checkpoint": recipe.load_checkpoint,
        "model.pretrained": recipe.model.pretrained,
        "model.model_config.checkpoint_name_or_path": recipe.model.config
        and recipe.model.config.checkpoint_name_or_path,
    }
    # What is named may be the folder around: output_dir itself stands for its newest checkpoint.
    read = [path for path in (weights.path, weights.adapter_path, weights.parts) if path] if weights else []
    problems = [
        f"{recipe.source.get(key, recipe.name)}: {key}: {path} is a result of an earlier run in output_dir "
        f"({recipe.output_dir}), which a new run sets aside: choose another output_dir"
        for key, given in inputs.items()
        for path in dict.fromkeys((Path(given), *read) if given else ())
        if path.is_relative_to(given) and outputs.is_result(Path(recipe.output_dir), path)
    ]
    if problems:
        raise InputError(*problems)
