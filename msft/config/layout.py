"""How a run's processes share the work: what MindFormers' `parallel_config` says, checked before anything starts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from msft.config.derive import strategy
from msft.config.schema import ParallelConfig, Recipe
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
        if self.tensor * self.pipeline == 1:
            return "each with the whole model and its share of every batch"
        stages = f" in {self.pipeline} stages, each" if self.pipeline > 1 else " that is"
        cut = f"{stages} cut over {self.tensor}" if self.tensor > 1 else f" in {self.pipeline} stages"
        return f"{self.data} shares of every batch, each for a model{cut}"


def layout(recipe: Recipe, spec: "ModelSpec", workers: int) -> Layout:
    """Return the layout of so many processes; a single one has the whole model.

    Raises InputError with every problem of the recipe's `parallel_config` and the nearest layout that works.
    """
    if workers == 1 and not recipe.use_parallel:
        return Layout()
    asked = recipe.parallel_config
    problems = [*_problems(recipe, spec, workers)]
    if problems:
        near = nearest(spec, workers, asked.model_parallel, asked.pipeline_stage)
        works = f"data_parallel {near.data}, model_parallel {near.tensor}"
        works += f", pipeline_stage {near.pipeline}" if asked.pipeline_stage > 1 else ""
        works += f" works for {workers}"
        raise InputError(*(f"{_where(recipe, key)}: {problem}; {works}" for key, problem in problems))
    data = workers // (asked.model_parallel * asked.pipeline_stage)
    return Layout(data, asked.model_parallel, strategy(recipe), pipeline=asked.pipeline_stage)


def nearest(spec: "ModelSpec", workers: int, tensor: int, pipeline: int = 1) -> Layout:
    """Return the layout of so many processes that is nearest to these sizes; the larger of two that are near."""
    sizes = [size for size in range(1, workers + 1) if workers % size == 0]
    slices = [size for size in sizes if not _undivided(spec, size)]
    stages = [size for size in sizes if spec.num_hidden_layers % size == 0 and size <= pipeline]
    possible = [(one, other) for one in slices for other in stages if workers % (one * other) == 0]

    def distance(found: tuple[int, int]) -> tuple:
        ratios = [max(size / asked, asked / size) for size, asked in zip(found, (tensor, pipeline), strict=True)]
        return ratios[0] * ratios[1], -found[0], -found[1]

    slices_of_stage, stages_of_model = min(possible, key=distance)
    return Layout(workers // (slices_of_stage * stages_of_model), slices_of_stage, pipeline=stages_of_model)


def _problems(recipe: Recipe, spec: "ModelSpec", workers: int) -> Iterator[tuple[str, str]]:
    asked = recipe.parallel_config
    yield from _stage_problems(asked, spec)
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


def _stage_problems(asked: ParallelConfig, spec: "ModelSpec") -> Iterator[tuple[str, str]]:
    stages, layers, micro_batches = asked.pipeline_stage, spec.num_hidden_layers, asked.micro_batch_num
    if layers % stages:
        yield "pipeline_stage", f"{stages} does not divide num_hidden_layers ({layers})"
    if stages > 1 and micro_batches < stages:
        yield "micro_batch_num", f"{micro_batches} micro-batches do not fill {stages} stages: {stages} would do"


def _undivided(spec: "ModelSpec", tensor: int) -> str:
    """What of a model cannot be dealt to so many processes: 'num_attention_heads (9)', or ""."""
    from msft.backend.slices import cut_counts

    return ", ".join(f"{name} ({count})" for name, count in cut_counts(spec).items() if count % tensor)


def _where(recipe: Recipe, key: str) -> str:
    path = f"parallel_config.{key}"
    return f"{recipe.source.get(path, recipe.name)}: {path}"
