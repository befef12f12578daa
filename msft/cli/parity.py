"""`msft parity`: runs one recipe on both engines and names the first place where they differ."""

from collections.abc import Sequence
from pathlib import Path

from msft.cli import guard

ENGINES = ("torch", "mindspore")
MODEL_STEPS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (1 = the engines differ)."""
    return guard.run(_parity, argv)


def parser() -> guard.Parser:
    """Return the parser of the command's own options; every other flag changes the recipe, as for `msft train`."""
    result = guard.Parser(
        prog="msft parity",
        usage="msft parity RECIPE.yaml [options] [--any.recipe.key VALUE ...]\n"
        "       msft parity --model HF_DIR --random_data [options]",
        description="Run both engines from one recipe; stop at the first stage in which they differ and say why. "
        "Stages: recipe, data, weights, forward, loss, backward, step, trajectory, generation.",
    )
    option = result.add_argument
    steps = f"steps of the trajectory (default: 20, or all the recipe has; {MODEL_STEPS} with --model)"
    option("--steps", type=int, help=steps)
    option("--engines", help="which to compare (default: torch,mindspore); one for --export-golden and --against")
    option("--output_dir", type=Path, help="for parity.json and parity.png (default: parity/ in the recipe's)")
    option("--all", action="store_true", help="go on after a stage that fails")
    option("--export-golden", type=Path, metavar="DIR", help="record one engine, to be compared on another machine")
    option("--against", type=Path, metavar="DIR", help="compare one engine with what was recorded")
    option("--perturb", action="store_true", help="one engine, one weight moved by one ulp: the natural drift")
    option("--model", type=Path, metavar="HF_DIR", help="check a model folder without a recipe")
    option("--random_data", action="store_true", help="with --model: random tokens, LoRA and then full")
    return result


def _parity(argv: Sequence[str]) -> int:
    given = list(argv)
    recipe = given.pop(0) if given and not given[0].startswith("-") else None
    words, overrides = parser().parse_known_args(given)
    if recipe is None and overrides and not overrides[0].startswith("-"):
        recipe = overrides.pop(0)
    engines = _check(words, recipe)
    if words.model:
        return _check_model(words, engines, overrides)
    return 0 if _run(words, recipe, engines, overrides, words.output_dir) else 1


def _check(words, recipe: str | None) -> list[str]:
    """Return the engines; raises InputError for options that do not go together."""
    from msft.errors import InputError, did_you_mean

    one = [name for name in ("export_golden", "against", "perturb") if getattr(words, name)]
    engines = words.engines.split(",") if words.engines else [] if one else list(ENGINES)
    problems = [
        f"--engines: unknown engine {name!r}{did_you_mean(name, ENGINES)} (known: {', '.join(ENGINES)})"
        for name in engines
        if name not in ENGINES
    ]
    if len(one) > 1:
        problems.append(f"--{one[0].replace('_', '-')} and --{one[1].replace('_', '-')} do not go together")
    if one and len(engines) > 1:
        problems.append(f"--{one[0].replace('_', '-')} runs one engine: --engines {engines[0]}")
    if not one and len(engines) != 2:
        problems.append("--engines: two are compared, as in torch,mindspore")
    if (recipe is None) == (words.model is None):
        problems.append("msft parity: name a recipe, or a model with --model HF_DIR --random_data")
    if bool(words.model) != words.random_data:
        problems.append("--model and --random_data go together: without a recipe there is no other data")
    if words.steps is not None and words.steps < 1:
        problems.append(f"--steps is {words.steps}, it must be 1 or more")
    if problems:
        raise InputError(*problems)
    return engines


def _check_model(words, engines: list[str], overrides: list[str]) -> int:
    """Check a model folder with random tokens: adapters first, then all weights."""
    import argparse

    from msft import console
    from msft.parity import random_data

    output_dir = words.output_dir or Path("output/parity")
    failed = []
    for kind, path in random_data.write_recipes(words.model, output_dir, words.steps or MODEL_STEPS).items():
        console.say(f"{kind}: {path}")
        golden = {name: place / kind for name in ("export_golden", "against") if (place := getattr(words, name))}
        own = argparse.Namespace(**{**vars(words), **golden})
        if not _run(own, str(path), engines, overrides, output_dir / kind):
            failed.append(kind)
    return 1 if failed else 0


def _run(words, path: str, engines: list[str], overrides: list[str], output_dir: Path | None) -> bool:
    from msft import console
    from msft.config.load import load_recipe
    from msft.parity.run import Settings, run

    first, fixed = load_recipe(path, overrides), []
    if first.resume_training or first.do_eval:
        console.note("parity compares training from its start: resume_training and do_eval are off")
        fixed += ["--resume_training", "False", "--do_eval", "False"]
    if first.run_mode not in ("train", "finetune"):
        console.note(f"parity compares training: run_mode {first.run_mode} is taken as finetune")
        fixed += ["--run_mode", "finetune"]
    if first.use_parallel:
        # One process an engine: the layout of the training does not count.
        fixed += ["--use_parallel", "False"]
    engines = engines or [first.backend]
    engines = engines * 2 if words.perturb else engines
    recipes = tuple(load_recipe(path, [*overrides, *fixed, "--backend", engine]) for engine in engines)
    settings = Settings(
        recipes=recipes,
        output_dir=output_dir or Path(first.output_dir) / "parity",
        steps=words.steps,
        every_stage=words.all,
        perturb=words.perturb,
        export=words.export_golden,
        against=words.against,
    )
    return run(settings)
