"""What a recipe asks of routed experts and state spaces, against the model that it names."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from msft.config.derive import strategy
from msft.config.schema import Recipe
from msft.errors import InputError

if TYPE_CHECKING:
    from msft.models.spec import ModelSpec

BALANCE = "moe_aux_loss_coef"


def check(recipe: Recipe, spec: "ModelSpec", workers: int) -> None:
    """Raise InputError for a balance loss of a model without experts, for experts and states in DeepSpeed's hands."""
    problems = [*_found(recipe, spec, workers)]
    if problems:
        raise InputError(*(f"{recipe.source.get(key, recipe.name)}: {key}: {message}" for key, message in problems))


def _found(recipe: Recipe, spec: "ModelSpec", workers: int) -> Iterator[tuple[str, str]]:
    at, keys = ("model.model_config", recipe.model.config) if recipe.model.config else ("model", recipe.model)
    if getattr(keys, BALANCE) and spec.experts is None:
        yield f"{at}.{BALANCE}", f"a {spec.family} model has no experts whose use could be balanced; leave it out"
    unseen = "experts are not" if spec.experts else "the parts of a state space are not" if spec.state_space else ""
    if unseen and workers > 1 and strategy(recipe) == "deepspeed":
        yield "strategy", f"deepspeed gathers weights of modules that are called, which {unseen}; fsdp has them"
