"""The `msft` command: finds the sub-command's file and calls its `main`."""

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "list": "tell the model families, their sizes, templates, and what was verified how",
    "recipe": "write the recipe of a family's size, full or LoRA",
    "train": "fine-tune, pretrain, evaluate or predict from a recipe",
    "estimate": "tell memory, speed and the best layout of a recipe on a device, without running it",
    "parity": "run a recipe on both engines and name the first place where they differ",
    "verify_layout": "compare a recipe's layout of processes with one process",
    "generate": "answer prompts with a model and an adapter",
    "merge": "write base weights plus adapter as one model",
    "convert_weight": "convert weights between Hugging Face and MindFormers' CKPT",
    "alpaca_converter": "turn alpaca rows into conversations",
    "llama_preprocess": "turn conversations or text into MindRecord",
    "transform_ckpt": "rewrite a checkpoint for another layout of processes",
    "launch": "start a recipe on several processes or machines",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `msft COMMAND ...`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from msft import __version__

        print(f"msft {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        from msft.errors import did_you_mean

        print(f"msft: unknown command {argv[0]!r}{did_you_mean(argv[0], COMMANDS)} (see msft --help)", file=sys.stderr)
        return 2
    return import_module(f"msft.cli.{argv[0]}").main(argv[1:])


def usage() -> str:
    """Return the text of `msft --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: msft COMMAND ...",
            "",
            "One recipe, two engines: fine-tune language models on MindSpore and on PyTorch.",
            "",
            *lines,
            "",
            "msft COMMAND --help tells a command's options; --debug shows the traceback of an error.",
        ]
    )
