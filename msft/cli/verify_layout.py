"""`msft verify_layout`: a recipe's layout of processes against one process, on this machine's devices."""

from collections.abc import Sequence
from pathlib import Path

from msft.cli import guard

STEPS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (1 = the layout gives another run than one process)."""
    return guard.run(_verify, argv)


def parser() -> guard.Parser:
    """Return the parser of the command's own options; every other flag changes the recipe, as for `msft train`."""
    result = guard.Parser(
        prog="msft verify_layout",
        usage="msft verify_layout RECIPE.yaml [options] [--any.recipe.key VALUE ...]",
        description="Train some steps of a recipe in one process, then under its layout (parallel_config, strategy) on "
        "several processes of this machine, and compare loss, gradient norm and supervised tokens of each step. The "
        "model must fit on one device: --model.model_config.num_layers makes it smaller.",
    )
    result.add_argument("--config", help="the recipe, as for run_finetune.py")
    result.add_argument("--nproc_per_node", type=int, metavar="N", help="processes (default: one for each accelerator)")
    result.add_argument("--steps", type=int, default=STEPS, help=f"how many (default: {STEPS})")
    result.add_argument(
        "--output_dir", type=Path, help="for the report and the logs (default: layout/ in the recipe's)"
    )
    result.add_argument("--record", type=Path, metavar="FILE", help="what each process runs: the steps alone, as JSON")
    return result


def _verify(argv: Sequence[str]) -> int:
    given = list(argv)
    named = given.pop(0) if given and not given[0].startswith("-") else None
    words, flags = parser().parse_known_args(given)
    from msft.config.load import load_recipe
    from msft.errors import InputError
    from msft.launch.devices import count
    from msft.parity.layout import Job, record, verify

    path = named or words.config
    if path is None:
        raise InputError("msft verify_layout: which recipe? (msft verify_layout RECIPE.yaml --nproc_per_node 2)")
    if words.steps < 1:
        raise InputError(f"--steps is {words.steps}, it must be 1 or more")
    recipe = load_recipe(path, flags)
    workers = words.nproc_per_node or count(recipe)
    output_dir = words.output_dir or Path(recipe.output_dir) / "layout"
    job = Job(path, tuple(flags), workers, words.steps, output_dir)
    if words.record:
        record(job, words.record)
        return 0
    if workers < 2:
        raise InputError("--nproc_per_node: a layout has 2 processes or more")
    return 0 if verify(job) else 1
