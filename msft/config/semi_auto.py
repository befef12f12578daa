"""`parallel.parallel_mode: 1`: from `parallel_config` to what MindSpore's semi-automatic mode is told."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from msft.config import derive
from msft.config.schema import Recipe
from msft.config.yaml_lines import write_yaml
from msft.errors import InputError

if TYPE_CHECKING:
    from msft.backend.plan import Plan
    from msft.models.spec import ModelSpec

MODE = "parallel.parallel_mode"
ONLY_ASCEND = (
    "MindSpore's semi-automatic mode exists on Ascend alone; parallel_mode 0 computes the same layout with explicit "
    "collectives here"
)
UNTRIED = (
    "1 was never run by msft's developers; parallel_mode 0 computes the same layout with collectives that are tested, "
    "and msft verify_layout holds either against one process"
)


def is_asked(recipe: Recipe, workers: int = 1) -> bool:
    """Whether a recipe asks for the semi-automatic mode; torch has none, and one process nothing to cut."""
    several = recipe.use_parallel or workers > 1
    return recipe.backend == "mindspore" and several and recipe.parallel.parallel_mode == 1


def plan(recipe: Recipe, spec: "ModelSpec", workers: int) -> "Plan":
    """Return what `parallel_config` says for so many processes; raises InputError with every problem."""
    from msft.backend.plan import Plan
    from msft.backend.strategies import problems

    asked = recipe.parallel_config
    tensor, stages, context = asked.model_parallel, asked.pipeline_stage, asked.context_parallel
    given = asked.data_parallel or max(1, workers // (tensor * stages * context))
    found = Plan(
        data=given,
        tensor=tensor,
        context=context,
        pipeline=stages,
        micro_batches=derive.gradient_accumulation(recipe, stages),
        vocab_emb_dp=asked.vocab_emb_dp,
        use_seq_parallel=asked.use_seq_parallel,
        shard_optimizer=recipe.parallel.enable_parallel_optimizer,
    )
    wrong = [*_impossible(recipe)]
    if not spec.is_like_llama or any(spec.windows) or spec.block.head_norms:
        # Its program is Llama's, and would compute another model without a word.
        wrong.append((MODE, f"1 computes Llama's layers, without windows or normed heads, not {spec.family}'s: take 0"))
    if found.devices != workers:
        parts = f"{given} x model_parallel {tensor} x context_parallel {context} x pipeline_stage {stages}"
        message = f"{parts} are {found.devices} processes, but there {_are(workers)}"
        wrong.append(("parallel_config.data_parallel", message))
    rows = derive.micro_batch_size(recipe) * given
    keys = problems(found, spec, rows, derive.seq_length(recipe))
    wrong += [(f"parallel_config.{key}", message) for key, message in keys]
    if wrong:
        raise InputError(*(f"{recipe.source.get(key, recipe.name)}: {key}: {message}" for key, message in wrong))
    return found


def _are(workers: int) -> str:
    return "is one" if workers == 1 else f"are {workers}"


def _impossible(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if derive.device(recipe) in ("cpu", "cuda"):
        yield MODE, f"1: {ONLY_ASCEND}"
    if recipe.run_mode not in ("train", "finetune"):
        yield MODE, f"1 is for training: run_mode {recipe.run_mode} runs with parallel_mode 0"
    if recipe.do_eval:
        yield "do_eval", "parallel_mode 1 trains alone: evaluate what it saves with parallel_mode 0"


def check_device(recipe: Recipe, device: str, workers: int) -> None:
    """Raise InputError when the device that was picked has no semi-automatic mode."""
    if is_asked(recipe, workers) and device != "npu":
        raise InputError(f"{recipe.source.get(MODE, recipe.name)}: {MODE} 1: {ONLY_ASCEND}")


def lines(found: "Plan", spec: "ModelSpec") -> list[str]:
    """Return what MindSpore would be told, as lines of YAML: the context, the cut of operators, layers of stages."""
    from msft.backend import cuts, strategies

    layers = [found.stage_of_layer(layer, spec.num_hidden_layers) for layer in range(spec.num_hidden_layers)]
    told = {
        "set_auto_parallel_context": cuts.context(found),
        "shard": {
            "wq, wk, wv, w1, w3": strategies.column(found)["product"],
            "wo, w2": strategies.row(found)["product"],
            "norms": strategies.norm(found)["weight"],
            "attention": strategies.attention(found)["fused"],
            "embedding": strategies.embedding(found, spec.vocab_size),
            "head": strategies.head(found, spec.vocab_size),
            "loss": strategies.loss(found, spec.vocab_size)["one_by_one"],
        },
        "layers_of_stages": [layers.count(stage) for stage in range(found.pipeline)],
        "micro_batches": found.micro_batches,
    }
    told["shard"] = {name: str(parts) for name, parts in told["shard"].items()}
    return ["# parallel_mode 1, for Ascend: generated and checked, never run by msft's developers"] + (
        write_yaml(told).rstrip().splitlines()
    )
