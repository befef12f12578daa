"""From a checked recipe to an engine on a device, and the words that tell what was applied."""

from dataclasses import dataclass, replace
from importlib import import_module
from math import prod
from types import ModuleType

from msft import console
from msft.backend.contract import Engine, Runtime, Tuning
from msft.backend.mesh import Mesh
from msft.config import deepspeed, derive, semi_auto
from msft.config.checks import check_device
from msft.config.layout import without_effect
from msft.config.schema import Recipe
from msft.data.batches import BatchStream, evaluation_batches
from msft.launch import heartbeat
from msft.models.shapes import tensor_shapes
from msft.models.spec import ModelSpec
from msft.train import schedules
from msft.train.prepare import Prepared, launched, processes


@dataclass(frozen=True)
class Session:
    """A running engine, its place among the ranks, and the module that adds numbers over them.

    `mesh` says who shares rows and weights, `deepspeed` is the whole configuration of that strategy.
    """

    engine: Engine
    rank: int
    world: int
    mesh: Mesh
    device: str
    distributed: ModuleType
    deepspeed: dict | None


def start(prepared: Prepared) -> Session:
    """Import the framework, choose the device, join the other processes, build the engine, and say what was applied."""
    recipe = prepared.recipe
    device_module = import_module(f"msft.backend.{recipe.backend}.device")
    device, why = device_module.pick(derive.device(recipe))
    check_device(recipe, device)
    semi_auto.check_device(recipe, device, processes())
    console.note(f"device: {device} ({why})")
    distributed = import_module(f"msft.backend.{recipe.backend}.distributed")
    parallel = launched()
    heartbeat.beat(0, "joining the other processes", patient=True)
    layout = prepared.layout
    # Where MindSpore cuts the model, all processes feed the same rows, as those of one model do.
    own = layout.tensor, layout.context, layout.pipeline, layout.sequence, layout.vocabulary
    cuts = (prepared.plan.devices,) if prepared.plan else own
    rank, world = distributed.initialize(device, *cuts) if parallel else (0, 1)
    for words in [] if prepared.plan else without_effect(recipe, layout):
        console.note(words)
    if world > 1:
        console.note(f"processes: {world}, {layout}")
    elif derive.strategy(recipe) != "ddp":
        console.note(f"strategy {recipe.strategy}: one process has nobody to share the model with, so it is whole")
    runtime: Runtime = derive.runtime(recipe, device, parallel)
    if runtime.strategy == "deepspeed" and world > 1:
        runtime = replace(runtime, deepspeed=deepspeed.whole(recipe, prepared.spec, world, device))
    runtime = replace(runtime, plan=prepared.plan)
    heartbeat.beat(0, "building the model", patient=True)
    engine_module = import_module(f"msft.backend.{recipe.backend}.engine")
    engine = engine_module.build(prepared.spec, prepared.weights.base, prepared.tuning, runtime)
    if prepared.weights.factors and prepared.resumed is None:
        engine.load_adapter(prepared.weights.factors)
    applied = engine.describe()
    console.note("applied: " + "; ".join(f"{key} {value}" for key, value in applied.items() if key != "device"))
    return Session(engine, rank, world, distributed.mesh(), device, distributed, runtime.deepspeed)


def train_stream(prepared: Prepared, mesh: Mesh) -> BatchStream:
    """Return the training batches of one rank; where MindSpore cuts the model, every rank has whole ones."""
    recipe, block, plan = prepared.recipe, prepared.recipe.train_dataset, prepared.plan
    return BatchStream(
        prepared.train_data,
        batch_size=derive.micro_batch_size(recipe) * (plan.data if plan else 1),
        gradient_accumulation_steps=derive.gradient_accumulation(recipe, prepared.layout.pipeline),
        pad_id=prepared.pad_id,
        **_share(Mesh() if plan else mesh),
        seed=recipe.seed,
        shuffle=block.data_loader.shuffle,
        drop_remainder=block.drop_remainder,
        epochs=derive.epochs(recipe),
        num_samples=block.data_loader.num_samples,
        padding="max_length" if plan else derive.padding(block),
        bucket_size=block.bucket_size,
        packing=block.packing,
        length_grouping=block.length_grouping,
        vocab_size=prepared.spec.vocab_size,
    )


def eval_stream(prepared: Prepared, mesh: Mesh) -> BatchStream:
    """Return the evaluation batches of one rank."""
    block = prepared.recipe.eval_dataset
    stream = evaluation_batches(
        prepared.eval_data,
        batch_size=derive.eval_batch_size(prepared.recipe),
        pad_id=prepared.pad_id,
        **_share(mesh),
        num_samples=block.data_loader.num_samples,
        padding=derive.padding(block),
        bucket_size=block.bucket_size,
        packing=block.packing,
        vocab_size=prepared.spec.vocab_size,
    )
    if block.packing:
        console.note(f"evaluation data: {stream.describe()}")
    return stream


def _share(mesh: Mesh) -> dict[str, int]:
    """What a rank of a mesh has of a batch's rows, and of their tokens."""
    return {"rank": mesh.data_rank, "world": mesh.data, "part": mesh.context_rank, "parts": mesh.context}


def last_step(recipe: Recipe, stream: BatchStream) -> int:
    """Return the step after which the run ends."""
    return min(stream.total_steps, derive.stop_step(recipe) or stream.total_steps)


def schedule(recipe: Recipe, stream: BatchStream) -> schedules.Resolved:
    """Return the recipe's learning-rate schedule for this run's length."""
    settings = derive.schedule(recipe)
    total = settings.total_steps or stream.total_steps
    steps = settings.warmup_steps
    if settings.warmup_epochs is not None:
        steps = int(settings.warmup_epochs * stream.steps_per_epoch)
    return schedules.Resolved(
        kind=settings.kind,
        peak=settings.learning_rate,
        total_steps=total,
        warmup_steps=schedules.warmup_length(total, settings.warmup_ratio, steps, settings.warmup_round_up),
        warmup_start=settings.warmup_start,
        lr_end=settings.lr_end,
        num_cycles=settings.num_cycles,
    )


def parameter_counts(spec: ModelSpec, tuning: Tuning) -> tuple[int, int]:
    """Return (all, tuned) numbers of parameters; adapters count in both."""
    shapes = tensor_shapes(spec)
    adapters = 0
    if tuning.lora:
        adapters = sum(tuning.lora.rank * sum(shapes[f"{module}.weight"]) for module in tuning.lora.modules)
    total = sum(map(prod, shapes.values())) + adapters
    return total, sum(prod(shapes[name]) for name in tuning.parameters) + adapters


def plan_lines(prepared: Prepared, stream: BatchStream | None) -> list[str]:
    """Say what a run will do: model, what is tuned, data, steps, learning rate."""
    recipe, spec, tuning = prepared.recipe, prepared.spec, prepared.tuning
    total, tuned = parameter_counts(spec, tuning)
    lines = [
        f"run: {recipe.run_mode} on {recipe.backend}, results in {recipe.output_dir}",
        f"model: {spec.family}, {spec.num_hidden_layers} layers, hidden {spec.hidden_size}, {total:,} parameters",
        f"weights: {prepared.weights.describe()}",
    ]
    if prepared.trains:
        what = [f"{len(tuning.parameters)} base tensors"] if tuning.parameters else []
        if tuning.lora:
            lora = tuning.lora
            what.append(f"LoRA rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}")
            what.append(f"{len(lora.modules)} modules")
        lines.append(f"tuned: {', '.join(what)}: {tuned:,} parameters ({100 * tuned / total:.3g} %)")
    if stream is not None:
        report, last = stream.report(), last_step(recipe, stream)
        lines += [
            f"data: {stream.describe()}, {report['rows_per_step']} rows a step, "
            f"{report['steps_per_epoch']:,} steps an epoch",
            f"steps: {last:,}" + (f", going on from {prepared.resumed}" if prepared.resumed else ""),
            f"learning rate: {schedule(recipe, stream)}",
        ]
    if stream is not None and stream.row_length > spec.max_position_embeddings:
        limit = spec.max_position_embeddings
        lines.append(f"warning: rows have up to {stream.row_length} tokens, the model was made for {limit}")
    return lines
