"""Where a run's weights come from: `load_checkpoint`, `model.pretrained`, or random numbers from the seed."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from msft.backend.contract import Lora
from msft.config.schema import Recipe
from msft.config.schema_model import PetConfig
from msft.convert import adapter, ckpt, rank_folder
from msft.convert.adapter import CONFIG, adapter_lora, read_adapter
from msft.convert.check import check_against
from msft.convert.detect import Kind, detect
from msft.convert.hf_folder import weights_file
from msft.convert.open import open_weights
from msft.convert.random_weights import RandomWeights
from msft.convert.source import TensorSource
from msft.errors import InputError
from msft.models.adapters import is_mindformers_adapter
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec
from msft.train import checkpoint, manifest
from msft.train.located import located
from msft.train.sliced import is_sliced
from msft.train.weights import Overlay, base_parts


@dataclass(frozen=True)
class Weights:
    """A base model, and the adapter to start from if one was given.

    `path` is where the base comes from, None for random numbers and for a base that has tensors of the checkpoint
    `parts`, for nobody else has that one. `adapter` is what the adapter's own config says
    (alpha NaN when it does not say), `factors` are its tensors under PEFT's names.
    """

    base: TensorSource
    path: Path | None
    adapter: Lora | None = None
    factors: dict[str, np.ndarray] | None = None
    adapter_path: Path | None = None
    parts: Path | None = None

    def describe(self) -> str:
        """Say where the weights come from."""
        base = str(self.path or self.parts or "random numbers from the seed")
        return f"{base}, adapter {self.adapter_path}" if self.adapter_path else base


def open_all(recipe: Recipe, spec: ModelSpec, resumed: Path | None) -> Weights:
    """Return the weights that a recipe names, checked against the model's tensors; no base tensor is read yet.

    `load_checkpoint` may be a Hugging Face folder, a CKPT, a PEFT folder, a checkpoint (or a folder of them), or the
    parent of MindFormers' `rank_0`: with `src_strategy_path_or_dir` the ranks' slices are joined. The base tensors of a
    checkpoint of parts take the place of those that the recipe names. `resumed` is the checkpoint that the run goes on
    from: its own model is the base when the recipe names none. Raises InputError for weights that do not fit, and when
    there are none although `run_mode` needs some.
    """
    given = Path(recipe.load_checkpoint) if recipe.load_checkpoint else None
    strategy = Path(recipe.src_strategy_path_or_dir) if recipe.src_strategy_path_or_dir else None
    if given and strategy is None:
        given = located(given)
    base_path = _base_without(recipe)
    adapter_path = None
    if given and (given / checkpoint.STATE).is_file():
        _check_whole(given)
    names = _ckpt_names(given, strategy) if given else []
    if given and _holds_adapter(given, names):
        adapter_path = given
        base_path = given if _holds_model(given, names) else base_path
    elif given and not is_sliced(given):
        base_path = given
    if base_path is None and resumed and _holds_model(resumed, _ckpt_names(resumed)):
        base_path = resumed
    sliced = given or (resumed if base_path is None else None)
    parts = base_parts(sliced)
    whole = set(parts) >= set(tensor_shapes(spec))
    if base_path is None and not whole and (recipe.run_mode != "train" or adapter_path):
        why = f"{adapter_path} is an adapter without its base model" if adapter_path else f"run_mode {recipe.run_mode}"
        if parts:
            why = f"{sliced} has {len(parts)} tensors of the model alone"
        raise InputError(f"{recipe.name}: {why}: name the base weights in model.pretrained or checkpoint_name_or_path")
    with rank_folder.slices_explained(None if strategy else given, f"name {rank_folder.KEY}"):
        of_base = strategy if base_path == given else None
        base = open_weights(base_path, spec, strategy=of_base) if base_path else RandomWeights(spec, recipe.seed)
        if parts:
            base, base_path = Overlay(base, parts), None
        check_against(spec, base)
        found = Weights(base, base_path, parts=sliced if parts else None)
        if adapter_path is None:
            return found
        config, factors = read_adapter(adapter_path, spec.family, strategy)
        lora = adapter_lora(config, factors, str(adapter_path))
        adapter.check_adapter(lora, factors, spec, str(adapter_path))
    return replace(found, adapter=lora, factors=factors, adapter_path=adapter_path)


def check_adapter(weights: Weights, wanted: Lora | None, where: str) -> None:
    """Raise InputError when training cannot go on from the adapter that `load_checkpoint` names.

    `wanted` is what the recipe's `pet_config` asks for.
    """
    if weights.adapter is None:
        return
    given, at = weights.adapter, f"{where}: load_checkpoint {weights.adapter_path}"
    if wanted is None:
        raise InputError(
            f"{at} is a LoRA adapter, but the recipe has no pet_config: add one to train the adapter on, "
            "or make a model of it first (msft merge)"
        )
    problems = []
    if given.rank != wanted.rank:
        problems.append(f"{at} has rank {given.rank}, pet_config.lora_rank is {wanted.rank}")
    if np.isfinite(given.alpha) and given.alpha != wanted.alpha:
        problems.append(f"{at} was trained with alpha {given.alpha:g}, pet_config.lora_alpha is {wanted.alpha:g}")
    if set(given.modules) != set(wanted.modules):
        different = sorted(set(given.modules) ^ set(wanted.modules))
        problems.append(f"{at} and pet_config.target_modules tune different modules (first: {different[0]})")
    if problems:
        raise InputError(*problems)


def with_alpha(weights: Weights, pet: PetConfig | None, where: str) -> Lora:
    """Return the given adapter's settings, with pet_config's alpha where the adapter (a CKPT) does not say it."""
    if np.isfinite(weights.adapter.alpha):
        return weights.adapter
    if pet is None:
        raise InputError(
            f"{where}: load_checkpoint {weights.adapter_path} does not say its alpha: give pet_config with lora_alpha"
        )
    return replace(weights.adapter, alpha=pet.lora_alpha)


def _base_without(recipe: Recipe) -> Path | None:
    """The base weights that the recipe names apart from `load_checkpoint`."""
    named = recipe.model.config.checkpoint_name_or_path if recipe.model.config else recipe.model.pretrained
    return Path(named) if named and Path(named).exists() else None


def _check_whole(folder: Path) -> None:
    problems = manifest.problems(folder)
    if problems:
        raise InputError(*(f"load_checkpoint: {problem}" for problem in problems))


def _holds_adapter(path: Path, names: list[str]) -> bool:
    return (path / CONFIG).is_file() or any(map(is_mindformers_adapter, names))


def _holds_model(path: Path, names: list[str]) -> bool:
    if path.is_dir() and weights_file(path):
        return True
    return any(not is_mindformers_adapter(name) and "." in name for name in names)


def _ckpt_names(path: Path, strategy: Path | None = None) -> list[str]:
    if strategy is not None:
        return [name for file in rank_folder.files(path).values() for name in ckpt.read_index(file, False).tensors]
    if (path / CONFIG).is_file() or (path / checkpoint.STATE).is_file():
        return []
    kind, file = detect(path)
    return list(ckpt.read_index(file).tensors) if kind is Kind.CKPT else []
