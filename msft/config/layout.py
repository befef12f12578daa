"""How a run's processes share the work: what MindFormers' `parallel_config` says, checked before anything starts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from msft.config import semi_auto
from msft.config.derive import strategy
from msft.config.schema import ParallelConfig, Recipe
from msft.errors import InputError

if TYPE_CHECKING:
    from msft.models.spec import ModelSpec


class Layout(NamedTuple):
    """`data` models of `pipeline` stages of `tensor` processes each, which hold slices of their layers' matrices.

    `context` processes share the tokens of the same rows. By a `strategy` other than ddp, processes that would have the
    same weights hold parts of them. `sequence` and `vocabulary` say what is dealt to the processes of `tensor` beside
    the matrices of layers.
    """

    data: int = 1
    tensor: int = 1
    strategy: str = "ddp"
    context: int = 1
    pipeline: int = 1
    sequence: bool = False
    vocabulary: bool = False

    def __str__(self) -> str:
        dealt = f", its tokens dealt to {self.context}" if self.context > 1 else ""
        is_shared = self.strategy != "ddp"
        if is_shared and self.tensor == 1:
            return f"each with its part of the model and its share of every batch ({self.strategy}){dealt}"
        if self.tensor == self.context == self.pipeline == 1:
            return "each with the whole model and its share of every batch"
        staged = f", each for a model in {self.pipeline} stages" if self.pipeline > 1 else ""
        of_stage = ", each" if staged else ", each for a model that is"
        cut = staged + (f"{of_stage} cut over {self.tensor}" if self.tensor > 1 else "")
        beside = ["its tokens"] * self.sequence + ["its vocabulary"] * self.vocabulary
        too = f", {' and '.join(beside)} too" if beside else ""
        parts = f"each with its part of the model ({self.strategy}), " if is_shared else ""
        return f"{parts}{self.data} shares of every batch{cut}{too}{dealt}"


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
        sizes = asked.model_parallel, asked.context_parallel, asked.pipeline_stage
        near = nearest(spec, workers, *sizes, vocabulary=not asked.vocab_emb_dp)
        tokens = f", context_parallel {near.context}" if asked.context_parallel > 1 else ""
        tokens += f", pipeline_stage {near.pipeline}" if asked.pipeline_stage > 1 else ""
        works = f"data_parallel {near.data}, model_parallel {near.tensor}{tokens} works for {workers}"
        raise InputError(*(f"{_where(recipe, key)}: {problem}; {works}" for key, problem in problems))
    is_cut = asked.model_parallel > 1
    data = workers // (asked.model_parallel * asked.context_parallel * asked.pipeline_stage)
    return Layout(
        data,
        asked.model_parallel,
        strategy(recipe) if data * asked.context_parallel > 1 else "ddp",
        asked.context_parallel,
        asked.pipeline_stage,
        sequence=is_cut and asked.use_seq_parallel,
        vocabulary=is_cut and not asked.vocab_emb_dp,
    )


def without_effect(recipe: Recipe, found: Layout) -> list[str]:
    """Say which keys deal out what a layout does not cut, or what no two of its processes have."""
    asked, kind = recipe.parallel_config, strategy(recipe)
    if found.tensor > 1:
        is_alone = kind != "ddp" and found.strategy == "ddp"
        return [f"strategy: {kind} has no effect: no two processes have the same weights to share"] * is_alone
    keys = ["use_seq_parallel: True"] * asked.use_seq_parallel + ["vocab_emb_dp: False"] * (not asked.vocab_emb_dp)
    return [f"parallel_config.{key} has no effect: no model is cut (model_parallel 1)" for key in keys]


def nearest(
    spec: "ModelSpec", workers: int, tensor: int, context: int = 1, pipeline: int = 1, vocabulary: bool = False
) -> Layout:
    """Return the layout of so many processes whose slices are nearest to `tensor`.

    Then its parts to `context`, and then its stages to `pipeline`, of which there are no more. Of two that are near,
    the larger. `vocabulary` says that embedding and head are dealt too.
    """
    size = _nearest([size for size in _divisors(workers) if not _undivided(spec, size, vocabulary)], tensor)
    parts = _nearest(_divisors(workers // size) if spec.is_like_llama else [1], context)
    left = workers // size // parts
    most = pipeline if spec.is_like_llama else 1
    possible = [count for count in _divisors(left) if count <= most and spec.num_hidden_layers % count == 0]
    stages = _nearest(possible, pipeline)
    return Layout(left // stages, size, context=parts, pipeline=stages)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _nearest(possible: list[int], wanted: int) -> int:
    return min(possible, key=lambda size: (max(size / wanted, wanted / size), -size))


def _problems(recipe: Recipe, spec: "ModelSpec", workers: int) -> Iterator[tuple[str, str]]:
    asked = recipe.parallel_config
    yield from _stage_problems(asked, spec)
    for key in ("context_parallel", "pipeline_stage") if not spec.is_like_llama else ():
        if getattr(asked, key) > 1:
            yield key, f"{getattr(asked, key)}: the layers of {spec.family} are not dealt to several processes yet"
    undivided = _undivided(spec, asked.model_parallel, not asked.vocab_emb_dp)
    if undivided:
        yield "model_parallel", f"{asked.model_parallel} does not divide {undivided}"
    started = "one process was started" if workers == 1 else f"{workers} processes are started"
    # A single process may try out what is meant for several that share its batches.
    shares = asked.data_parallel if workers > 1 else None
    product = (shares or 1) * asked.model_parallel * asked.context_parallel * asked.pipeline_stage
    parts = f"model_parallel {asked.model_parallel}"
    if asked.context_parallel > 1:
        parts += f" x context_parallel {asked.context_parallel}"
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


def _undivided(spec: "ModelSpec", tensor: int, vocabulary: bool) -> str:
    """What of a model cannot be dealt to so many processes, or ""."""
    from msft.backend.slices import undivided

    return ", ".join(undivided(spec, tensor, vocabulary))


def _where(recipe: Recipe, key: str) -> str:
    path = f"parallel_config.{key}"
    return f"{recipe.source.get(path, recipe.name)}: {path}"
