"""`msft recipe`: the recipe of a family's published size, full or LoRA."""

import json
from collections.abc import Sequence
from pathlib import Path

from msft.cli import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guard.run(_recipe, argv)


def parser() -> guard.Parser:
    """Return the command's parser."""
    result = guard.Parser(
        prog="msft recipe",
        description="Write the recipe (YAML, every key commented) of a model family's published size; msft list "
        "tells families and sizes.",
    )
    option = result.add_argument
    option("--model", required=True, help="the family, such as qwen2")
    option("--size", required=True, help="the size, such as 7b")
    option("--method", required=True, choices=("lora", "full"), help="adapters, or all weights")
    option("--output_path", type=Path, help="the YAML to write (default: printed)")
    option("--pretrained", type=Path, help="the model's folder (default: the release's name)")
    option("--devices", type=int, default=1, help="processes that share every batch (default: 1)")
    option(
        "--write_config",
        action="store_true",
        help="put the published config.json into the model's folder: enough "
        "for msft estimate before the weights are there",
    )
    return result


def _recipe(argv: Sequence[str]) -> None:
    words = parser().parse_args(argv)
    from msft import console
    from msft.errors import InputError
    from msft.files import write_text
    from msft.models.sizes import published
    from msft.recipes.write import recipe

    if words.devices < 1:
        raise InputError(f"--devices: must be 1 or more, not {words.devices}")
    file = str(words.output_path or "recipe.yaml")
    text = recipe(words.model, words.size, words.method, str(words.pretrained or ""), file, words.devices)
    if words.write_config:
        _write_config(words, words.pretrained or Path(published(words.model, words.size).release))
    if words.output_path is None:
        console.say(text.rstrip("\n"))
        return
    write_text(words.output_path, text)
    console.note(f"written: {words.output_path}")


def _write_config(words, folder: Path) -> None:
    from msft import console
    from msft.files import write_text
    from msft.models.sizes import config_of, published

    path = folder / "config.json"
    if path.exists():
        console.note(f"{path}: is there already and stays as it is")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(config_of(words.model, published(words.model, words.size)), indent=2) + "\n")
    console.note(f"written: {path}, the published sizes")
