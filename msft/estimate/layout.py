"""How a run is split over devices, in MindFormers' terms."""

from collections.abc import Iterator
from math import isqrt
from typing import NamedTuple

from msft.config import derive
from msft.config.layout import not_dealt, unshared
from msft.config.markers import shown
from msft.config.schema import Recipe
from msft.errors import InputError
from msft.models.spec import ModelSpec

# Devices of one machine, which its fast links join; a group of tensor parallelism stays within it.
MACHINE = 8


class Layout(NamedTuple):
    """`data` x `tensor` x `pipeline` x `context` devices; `micro_batches` are those of a data-parallel share in a step.

    `context` devices share the tokens of the same rows and gather keys and values (arXiv:2407.21783, section 3.3.2).
    `sequence_parallel` splits norms and hidden states over the tensor group (Korthikanti et al., arXiv:2205.05198).
    `optimizer_sharding` deals the moments to the data group, whose members update a share of the tuned weights each and
    gather the others' (ZeRO stage 1, arXiv:1910.02054). `whole_embedding` leaves embedding and head unsplit
    (vocab_emb_dp). `weights_sharded` deals tuned weights and gradients out too and gathers weights in the compute
    dtype, as MindSpore and fully sharded data parallelism do, for comparing with their published speeds;
    `reduce_scatters` counts what sequence parallelism sends in MindFormers, for the same. `fully_sharded` is msft's own
    `strategy: fsdp`: all weights, gradients and moments are dealt to the data group, weights gathered block by block.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    micro_batches: int = 1
    optimizer_sharding: bool = False
    whole_embedding: bool = False
    weights_sharded: bool = False
    context: int = 1
    reduce_scatters: bool = False
    fully_sharded: bool = False

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.replicas * self.tensor * self.pipeline

    @property
    def replicas(self) -> int:
        """How many devices have the same weights."""
        return self.data * self.context

    @property
    def moment_parts(self) -> int:
        """Over how many devices with the same weights the moments are dealt."""
        return self.replicas if self.optimizer_sharding or self.fully_sharded else 1

    @property
    def vocabulary_parts(self) -> int:
        """Over how many devices the embedding and the head are split."""
        return 1 if self.whole_embedding else self.tensor

    def __str__(self) -> str:
        words = [f"data {self.data} x tensor {self.tensor} x pipeline {self.pipeline}"]
        words[0] += f" x context {self.context}" if self.context > 1 else ""
        words += ["sequence parallel"] * self.sequence_parallel + ["optimizer sharded"] * self.optimizer_sharding
        words += ["fully sharded"] * self.fully_sharded
        return ", ".join(words)


def layout_of(recipe: Recipe) -> Layout:
    """Return the layout that a recipe asks for; without `use_parallel` it is one device.

    A key without a value counts as 1. With a pipeline its `micro_batch_num` counts too (MindFormers).
    Raises InputError naming every value that is no count.
    """
    if not recipe.use_parallel:
        return Layout(micro_batches=derive.gradient_accumulation(recipe))
    names = ("data_parallel", "model_parallel", "pipeline_stage", "context_parallel")
    values = {name: 1 if (value := getattr(recipe.parallel_config, name)) is None else value for name in names}
    problems = [
        f"{_place(recipe, name)} must be a whole number above 0, not {shown(value)}"
        for name, value in values.items()
        if type(value) is not int or value < 1
    ]
    if problems:
        raise InputError(*problems)
    data, tensor, pipeline, context = values.values()
    found = Layout(
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        sequence_parallel=recipe.parallel_config.use_seq_parallel and tensor > 1,
        micro_batches=derive.gradient_accumulation(recipe, pipeline),
        whole_embedding=recipe.parallel_config.vocab_emb_dp,
        context=context,
    )
    return _dealt(recipe, found)


def _dealt(recipe: Recipe, layout: Layout) -> Layout:
    """What devices with the same weights share out: the moments, or everything."""
    shares, is_full = layout.replicas > 1, derive.strategy(recipe) == "fsdp"
    optimizer = shares and not is_full and bool(recipe.parallel.enable_parallel_optimizer)
    return layout._replace(optimizer_sharding=optimizer, fully_sharded=shares and is_full)


def on_devices(recipe: Recipe, layout: Layout, devices: int | None, spec: ModelSpec) -> Layout:
    """Return the layout on so many devices, of which data parallelism takes what the others leave; checked.

    Raises InputError naming everything that does not divide.
    """
    devices = layout.devices if devices is None else devices
    problems = list(_undivided(recipe, layout, devices, spec))
    if problems:
        raise InputError(*problems)
    return _dealt(recipe, layout._replace(data=devices // (layout.tensor * layout.pipeline * layout.context)))


def _undivided(recipe: Recipe, layout: Layout, devices: int, spec: ModelSpec) -> Iterator[str]:
    group = layout.tensor * layout.pipeline * layout.context
    if devices < 1:
        yield f"--devices is {devices}, it must be 1 or more"
    elif devices % group:
        near = max(devices // group, 1) * group
        split = f"model_parallel {layout.tensor} x pipeline_stage {layout.pipeline}"
        split += f" x context_parallel {layout.context}" if layout.context > 1 else ""
        yield f"--devices is {devices}, which {split} does not divide; {near} would do"
    tensor, pipeline = _place(recipe, "model_parallel"), _place(recipe, "pipeline_stage")
    if MACHINE % layout.tensor:
        near = _nearest(layout.tensor, divisors(MACHINE))
        yield f"{tensor} is {layout.tensor}, which does not divide a machine of {MACHINE} devices; {near} would do"
    if not _splits(layout.tensor, spec, layout.whole_embedding):
        sizes = f"{spec.num_attention_heads} heads, {spec.num_key_value_heads} key-value heads, feed-forward width "
        tokens = "" if layout.whole_embedding else f", {spec.vocab_size} tokens"
        near = _nearest(layout.tensor, tensor_sizes(spec, layout.whole_embedding))
        yield (
            f"{tensor} is {layout.tensor}, which does not divide {sizes}{spec.intermediate_size}{tokens}; "
            f"{near} would do"
        )
    for key in not_dealt(recipe, spec) if group > 1 else ():
        yield f"{_place(recipe, key)}: the layers of {spec.family} are not dealt to several processes yet"
    yield from unshared(recipe, spec)
    if spec.num_hidden_layers % layout.pipeline:
        near = _nearest(layout.pipeline, divisors(spec.num_hidden_layers))
        yield f"{pipeline} is {layout.pipeline}, which does not divide {spec.num_hidden_layers} layers; {near} would do"


def divisors(number: int) -> list[int]:
    """Return what divides a number, ascending."""
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def tensor_sizes(spec: ModelSpec, whole_embedding: bool = False) -> list[int]:
    """Return the sizes of tensor groups that a machine holds and the model's heads and widths can be split over.

    Its tokens too, but for a `whole_embedding`.
    """
    return [size for size in divisors(MACHINE) if _splits(size, spec, whole_embedding)]


def _splits(size: int, spec: ModelSpec, whole_embedding: bool) -> bool:
    tokens = 0 if whole_embedding else spec.vocab_size
    return not any(whole % size for whole in (spec.num_key_value_heads, spec.intermediate_size, tokens))


def _nearest(wanted: int, possible: list[int]) -> int:
    return min(possible, key=lambda size: abs(size - wanted))


def _place(recipe: Recipe, name: str) -> str:
    path = f"parallel_config.{name}"
    return f"{recipe.source.get(path, recipe.name)}: {path}"
