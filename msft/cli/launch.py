"""`msft launch X.yaml`: a recipe on several processes or machines; and the words of `msrun_launcher.sh`."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from msft.cli import guard
from msft.cli.train import RESUME


def main(argv: Sequence[str] | None = None) -> int:
    """Run `msft launch`; returns the exit code."""
    return guard.run(_launch, argv)


def msrun_launcher(argv: Sequence[str]) -> int:
    """Run the command that `msrun_launcher.sh` got as 1, 2, 6 or 9 words; returns the exit code."""
    return guard.run(_launch_words, argv)


def parser() -> guard.Parser:
    """Return the parser of `msft launch`'s own options; the recipe and the flags that change it are left over."""
    given = os.environ.get
    result = guard.Parser(
        prog="msft launch",
        usage="msft launch RECIPE.yaml [options] [flags of msft train]",
        description="Run a recipe on several processes: msrun for backend mindspore, torchrun for backend torch. "
        "Options that are not given are taken from the environment variables NPROC_PER_NODE, NNODES, NODE_RANK, "
        "MASTER_ADDR and MASTER_PORT.",
    )
    number = {"type": int, "metavar": "N"}
    result.add_argument(
        "--nproc_per_node",
        **number,
        default=given("NPROC_PER_NODE"),
        help="processes on each machine (default: one for each accelerator here, 1 without any)",
    )
    result.add_argument("--nnodes", **number, default=given("NNODES", "1"), help="machines (default: 1)")
    result.add_argument("--node_rank", **number, default=given("NODE_RANK", "0"), help="this machine, from 0")
    result.add_argument("--master_addr", default=given("MASTER_ADDR", "127.0.0.1"), help="machine 0, name or address")
    result.add_argument(
        "--master_port", **number, default=given("MASTER_PORT"), help="port there (default: 8118, or a free one)"
    )
    result.add_argument("--log_dir", type=Path, help="folder of the logs (default: output/msrun_log)")
    result.add_argument("--dry-run", "--dry_run", action="store_true", help="print the command line, start nothing")
    return result


def _check_options(options: guard.Parser, rest: Sequence[str]) -> None:
    """Refuse a mistyped option of the launcher, before it is taken for a key of the recipe."""
    from difflib import get_close_matches

    known = [word for action in options._actions for word in action.option_strings]
    for word in rest:
        near = get_close_matches(word.split("=")[0], known, n=1, cutoff=0.85) if word.startswith("--") else []
        if near:
            options.error(f"unknown option {word}, did you mean '{near[0]}'?")


def _launch(argv: Sequence[str]) -> None:
    options = parser()
    words, rest = options.parse_known_args(argv)
    _check_options(options, rest)
    from msft.errors import InputError
    from msft.launch.devices import count
    from msft.launch.layout import LOG_DIR, Layout
    from msft.launch.program import from_train_words
    from msft.launch.run import launch

    if not rest:
        raise InputError("msft launch: which recipe? (msft launch RECIPE.yaml, see msft launch --help)")
    program = from_train_words(rest)
    local = count(program.recipe) if words.nproc_per_node is None else words.nproc_per_node
    layout = Layout(
        workers=words.nnodes * local,
        local_workers=local,
        master_addr=words.master_addr,
        master_port=words.master_port,
        node_rank=words.node_rank,
        log_dir=words.log_dir or Path(LOG_DIR),
    )
    launch(layout, program, words.dry_run, shlex.join(["msft", "launch", *argv, *RESUME]))


def _launch_words(argv: Sequence[str]) -> None:
    from msft import console
    from msft.launch.program import from_text
    from msft.launch.run import launch
    from msft.launch.words import USAGE, parse

    if list(argv) in (["-h"], ["--help"]):
        console.say(USAGE)
        return
    dry, words = "--dry-run" in argv[:1], list(argv)
    text, layout = parse(words[1:] if dry else words)
    after = words[2:] if dry else words[1:]
    resume = shlex.join(["bash", "scripts/msrun/msrun_launcher.sh", f"{text} {shlex.join(RESUME)}", *after])
    launch(layout, from_text(text), dry, resume)
