"""`msft estimate`: what a recipe needs and how fast it is on a device, from its numbers alone."""

from collections.abc import Sequence
from pathlib import Path

from msft.cli import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guard.run(_estimate, argv)


def parser() -> guard.Parser:
    """Return the parser of the command's own options; every other flag changes the recipe, as for `msft train`."""
    result = guard.Parser(
        prog="msft estimate",
        usage="msft estimate RECIPE.yaml [options] [--any.recipe.key VALUE ...]",
        description="Tell the memory of a device part by part, the time of a step, what is sent between devices, the "
        "largest micro-batch that fits and the fastest layout. Nothing is run, no framework is imported.",
    )
    option = result.add_argument
    option("--device", help="ascend910b, a100, h100 or cpu (this machine); default: what the recipe runs on")
    option("--devices", type=int, metavar="N", help="how many; default: as many as the recipe's parallel_config has")
    option("--json", type=Path, metavar="FILE", help="write all numbers (bytes, seconds) to a file")
    return result


def _estimate(argv: Sequence[str]) -> None:
    given = list(argv)
    path = given.pop(0) if given and not given[0].startswith("-") else None
    words, overrides = parser().parse_known_args(given)
    from msft.errors import InputError

    if path is None and overrides and not overrides[0].startswith("-"):
        path = overrides.pop(0)
    if path is None:
        raise InputError("msft estimate: which recipe? (msft estimate RECIPE.yaml, see msft estimate --help)")
    from msft import console
    from msft.config import semi_auto
    from msft.config.load import load_recipe
    from msft.estimate import report
    from msft.estimate.run import estimate

    result = estimate(load_recipe(path, overrides), words.device, words.devices)
    report.tell(result)
    workers, spec = result.asked.layout.devices, result.sizes.spec
    if semi_auto.is_asked(result.recipe, workers):
        console.say("\n".join(semi_auto.lines(semi_auto.plan(result.recipe, spec, workers), spec)))
    if words.json:
        report.write(words.json, result)
