"""A parity check from its settings to its verdict: stage after stage, until the first that fails."""

from dataclasses import dataclass, replace
from pathlib import Path

from msft import console
from msft.backend.mesh import Mesh
from msft.config import derive
from msft.config.schema import Recipe
from msft.errors import InputError
from msft.parity import computation, diagnose, golden, inputs, report, training
from msft.parity.compare import Verdict
from msft.parity.golden import Golden
from msft.parity.judge import StageResult, judge
from msft.parity.observe import STAGES, Observation
from msft.parity.perturbed import PerturbedWeights
from msft.parity.side import Side, open_side
from msft.train import setup, versions
from msft.train.prepare import Prepared, prepare

OBSERVERS = {
    "recipe": inputs.observe_recipe,
    "data": inputs.observe_data,
    "weights": inputs.observe_weights,
    "forward": computation.observe_forward,
    "loss": computation.observe_loss,
    "backward": computation.observe_backward,
    "step": training.observe_step,
    "trajectory": training.observe_trajectory,
    "generation": training.observe_generation,
}
DEFAULT_STEPS = 20


@dataclass(frozen=True)
class Settings:
    """What is compared: `recipes` has one resolved recipe a side; `steps` None means 20, or all that there are.

    `against` and `export` are golden folders. `perturb` moves one weight of the second side by one ulp; what comes
    of that is told and fails nothing.
    """

    recipes: tuple[Recipe, ...]
    output_dir: Path
    steps: int | None = None
    every_stage: bool = False
    perturb: bool = False
    export: Path | None = None
    against: Path | None = None


def run(settings: Settings) -> bool:
    """Run a parity check, write its report, and return whether every stage that ran passed.

    Raises InputError for recipes and golden folders that are wrong, RunError when an engine fails.
    """
    _check_places(settings)
    recorded = golden.read(settings.against) if settings.against else None
    if recorded:
        packages = recorded.versions.get("packages", {})
        told = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        console.note(f"{settings.against}: {recorded.label} with {told}")
    prepared = [prepare(recipe) for recipe in settings.recipes]
    steps = _steps(settings, prepared[0], recorded)
    if settings.perturb:
        weights = prepared[1].weights
        moved = PerturbedWeights(weights.base, prepared[1].spec)
        console.note(f"one ulp: {moved.describe()}")
        prepared[1] = replace(prepared[1], weights=replace(weights, base=moved))
    sides = [open_side(one, label, steps) for one, label in zip(prepared, _labels(settings), strict=True)]
    if settings.export:
        _export(settings.export, sides[0])
        return True
    pair = [recorded, *sides] if recorded else sides
    results: list[StageResult] = []
    try:
        _compare(pair, sides, settings, results)
    finally:
        # Whatever happens in a stage, those before it are told.
        report.write(settings.output_dir, results, steps, [side.label for side in pair], settings.perturb)
    return all(result.passed for result in results)


def _check_places(settings: Settings) -> None:
    """Refuse what could not be written at the end."""
    if settings.export and settings.export.exists():
        raise InputError(f"--export-golden: {settings.export} exists: name a new folder, or remove it")
    if settings.output_dir.exists() and not settings.output_dir.is_dir():
        raise InputError(f"--output_dir: {settings.output_dir} is a file")


def _steps(settings: Settings, prepared: Prepared, recorded: Golden | None) -> int:
    total = setup.train_stream(prepared, Mesh()).total_steps
    if recorded:
        if settings.steps not in (None, recorded.steps):
            raise InputError(
                f"--steps: {settings.against} was recorded with {recorded.steps} steps, not {settings.steps}"
            )
        return recorded.steps
    if settings.steps is None:
        return min(DEFAULT_STEPS, total)
    if settings.steps > total:
        epochs = -(-settings.steps * derive.epochs(prepared.recipe) // total)
        raise InputError(f"--steps: the recipe has {total} steps, not {settings.steps} (add --epochs {epochs})")
    return settings.steps


def _labels(settings: Settings) -> list[str]:
    labels = [recipe.backend for recipe in settings.recipes]
    if len(set(labels)) < len(labels):
        return [labels[0], f"{labels[1]}, one ulp off" if settings.perturb else f"{labels[1]} again"]
    return labels


def observe(side: Side, stage: str) -> Observation:
    """Return what a running side shows in a stage."""
    console.note(f"{stage}: {side.label} ...")
    return OBSERVERS[stage](side).bounded()


def _export(folder: Path, side: Side) -> None:
    observations = {stage: observe(side, stage).reduced() for stage in STAGES}
    found = versions.collect(side.prepared.recipe.backend, side.session.device, 1, {})
    golden.write(folder, Golden(side.label, side.steps, found, observations))
    console.say(f"written: {folder} ({side.label}, {side.steps} steps)")
    console.say(f"next: msft parity RECIPE --engines mindspore|torch --against {folder}")


def _compare(pair: list, sides: list[Side], settings: Settings, results: list[StageResult]) -> None:
    """Add the result of each stage to `results` as soon as it is known."""
    bar = Verdict.DIVERGES if settings.perturb else _bar(sides)
    for stage in STAGES:
        seen = {one.label: one.observe(stage) if isinstance(one, Golden) else observe(one, stage) for one in pair}
        result = judge(stage, *seen.items(), bar)
        if not result.passed:
            result = replace(result, cause=diagnose.cause(result, seen, sides))
        results.append(result)
        report.tell(result)
        if not (result.passed or settings.every_stage):
            break


def _bar(sides: list[Side]) -> Verdict:
    """What must be reached: float32 agreement where everything is computed in float32, else bfloat16's."""
    computes = {side.engine.dtypes()["compute"] for side in sides}
    return Verdict.FP32 if computes == {"float32"} else Verdict.BF16
