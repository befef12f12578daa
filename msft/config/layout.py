"""How a run's processes share the work: what MindFormers' `parallel_config` says, checked before anything starts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from msft.config import semi_auto
from msft.config.derive import strategy
from msft.config.schema import Recipe
from msft.errors import InputError

if TYPE_CHECKING:
    from msft.models.spec import ModelSpec


class Layout(NamedTuple):
    """`data` models of `pipeline` stages of `tensor` processes each, which hold slices of their layers' matrices.

    `context` processes share the tokens of the same rows. By a `strategy` other than ddp, all processes hold parts of
    one model.
    """

    data: int = 1
    tensor: int = 1
    strategy: str = "ddp"
    context: int = 1
    pipeline: int = 1

    def __str__(self) -> str:
        if self.strategy != "ddp":
            return f"each with its part of the model and its share of every batch ({self.strategy})"
        if self.tensor == 1:
            return "each with the whole model and its share of every batch"
        return f"{self.data} shares of every batch, each for a model that is cut over {self.tensor}"


def layout(recipe: Recipe, spec: "ModelSpec", workers: int) -> Layout:
    """Return the layout of so many processes; a single one has the whole model.

    Raises InputError with every problem of the recipe's `parallel_config` and the nearest layout that works.
    """
    if workers == 1 and not recipe.use_parallel:
        return Layout()
    if semi_auto.is_asked(recipe, workers):
        found = semi_auto.plan(recipe, spec, workers)
        return Layout(found.data, found.tensor, context=found.context, pipeline=found.pipeline)
    asked = recipe.parallel_config
    problems = [*_problems(recipe, spec, workers)]
    if problems:
        near = nearest(spec, workers, asked.model_parallel)
        works = f"data_parallel {near.data}, model_parallel {near.tensor} works for {workers}"
        raise InputError(*(f"{_where(recipe, key)}: {problem}; {works}" for key, problem in problems))
    return Layout(workers // asked.model_parallel, asked.model_parallel, strategy(recipe))


def nearest(spec: "ModelSpec", workers: int, tensor: int) -> Layout:
    """Return the layout of so many processes whose slices are nearest to `tensor`; the larger of two that are near."""
    possible = [size for size in range(1, workers + 1) if workers % size == 0 and not _undivided(spec, size)]
    size = min(possible, key=lambda size: (max(size / tensor, tensor / size), -size))
    return Layout(workers // size, size)


def _problems(recipe: Recipe, spec: "ModelSpec", workers: int) -> Iterator[tuple[str, str]]:
    asked = recipe.parallel_config
    if asked.pipeline_stage > 1:
        yield "pipeline_stage", f"{asked.pipeline_stage}: a model is not cut into stages here, only its matrices are"
    undivided = _undivided(spec, asked.model_parallel)
    if undivided:
        yield "model_parallel", f"{asked.model_parallel} does not divide {undivided}"
    started = "one process was started" if workers == 1 else f"{workers} processes are started"
    # A single process may try out what is meant for several that share its batches.
    shares = asked.data_parallel if workers > 1 else None
    product = (shares or 1) * asked.model_parallel * asked.pipeline_stage
    parts = f"model_parallel {asked.model_parallel}"
    if asked.pipeline_stage > 1:
        parts += f" x pipeline_stage {asked.pipeline_stage}"
    if shares and product != workers:
        yield "data_parallel", f"{shares} x {parts} are {product} processes, but {started}"
    elif workers % product:
        yield "model_parallel", f"{parts} needs {product} processes or a multiple of them, but {started}"


def _undivided(spec: "ModelSpec", tensor: int) -> str:
    """What of a model cannot be dealt to so many processes: 'num_attention_heads (9)', or ""."""
    from msft.backend.slices import cut_counts

    return ", ".join(f"{name} ({count})" for name, count in cut_counts(spec).items() if count % tensor)


def _where(recipe: Recipe, key: str) -> str:
    path = f"parallel_config.{key}"
    return f"{recipe.source.get(path, recipe.name)}: {path}"
