"""`msft launch X.yaml`: a recipe on several processes or machines; and the words of `msrun_launcher.sh`."""

import os
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msft.cli import guard
from msft.cli.train import RESUME

if TYPE_CHECKING:
    from msft.launch.cluster import Given


MAX_RESTARTS = "MSFT_MAX_RESTARTS"


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
        "MASTER_ADDR, MASTER_PORT and MSFT_MAX_RESTARTS, then from --hostfile or a Slurm allocation. Nothing is "
        "started over ssh: each machine runs its own launcher with the same words. Its number is found from its name "
        "or addresses in the hostfile, or from SLURM_NODEID (srun --ntasks-per-node=1 msft launch ...). The launchers "
        "talk to each other on the port after MASTER_PORT. When a process fails, or a machine is not heard for 12 "
        "seconds, the job ends on all machines.",
    )
    number = {"type": int, "metavar": "N"}
    result.add_argument(
        "--nproc_per_node",
        **number,
        default=given("NPROC_PER_NODE"),
        help="processes on each machine (default: one for each accelerator here, 1 without any)",
    )
    result.add_argument("--nnodes", **number, default=given("NNODES"), help="machines (default: 1)")
    result.add_argument("--node_rank", **number, default=given("NODE_RANK"), help="this machine, from 0")
    result.add_argument("--master_addr", default=given("MASTER_ADDR"), help="machine 0, name or address")
    result.add_argument(
        "--master_port", **number, default=given("MASTER_PORT"), help="port there (default: 8118, or a free one)"
    )
    result.add_argument(
        "--hostfile", type=Path, help="the machines, a line `host slots=8` for each; the first one is machine 0"
    )
    result.add_argument(
        "--max_restarts",
        **number,
        default=given(MAX_RESTARTS, "0"),
        help="after a failure, start again from the last whole checkpoint; end after N restarts in a row without a "
        "newer checkpoint (default: 0)",
    )
    result.add_argument(
        "--hang_timeout",
        metavar="SECONDS",
        help="end the job, with the stacks of all ranks in their logs, when no rank has made progress for so long; "
        "three times as long for the start, a first step and saving; a later step that compiles for a new length of "
        "rows has to fit; 0 = never (default: the recipe's hang_timeout, which is 1200 if it says nothing)",
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
    from msft.launch.layout import ADDRESS, LOG_DIR, Layout
    from msft.launch.program import from_train_words
    from msft.launch.run import launch

    if not rest:
        raise InputError("msft launch: which recipe? (msft launch RECIPE.yaml, see msft launch --help)")
    if words.hang_timeout is not None:
        rest = [*rest, "--hang_timeout", words.hang_timeout]
    program = from_train_words(rest)
    found = _machines(words)
    local = count(program.recipe) if found.nproc_per_node is None else found.nproc_per_node
    layout = Layout(
        workers=(1 if found.nnodes is None else found.nnodes) * local,
        local_workers=local,
        master_addr=found.master_addr or ADDRESS,
        master_port=words.master_port,
        node_rank=found.node_rank or 0,
        log_dir=words.log_dir or Path(LOG_DIR),
    )
    resume = shlex.join(["msft", "launch", *argv, *RESUME])
    launch(layout, program, words.dry_run, resume, _restarts(words.max_restarts))


def _machines(words: Namespace) -> "Given":
    """What flags and variables say, completed by the hostfile, or by Slurm where several machines may be meant."""
    from msft.launch.cluster import Given, arrange, read_hostfile
    from msft.launch.slurm import from_slurm

    given = Given(words.nnodes, words.nproc_per_node, words.node_rank, words.master_addr)
    if words.hostfile:
        return arrange(read_hostfile(words.hostfile), given)
    if os.environ.get("SLURM_JOB_NODELIST") and words.nnodes != 1:
        return arrange(from_slurm(os.environ), given)
    return given


def _restarts(word: int | str) -> int:
    from msft.errors import InputError

    if not str(word).isdigit():
        raise InputError(f"{MAX_RESTARTS} or --max_restarts: {word!r} is not a number of restarts")
    return int(word)


def _launch_words(argv: Sequence[str]) -> None:
    from msft import console
    from msft.launch.program import from_text
    from msft.launch.run import launch
    from msft.launch.words import USAGE, parse

    if list(argv) in (["-h"], ["--help"]):
        console.say(USAGE)
        return
    dry, words = "--dry-run" in argv[:1], list(argv)
    text, layout = parse(words[1:] if dry else words, os.environ.get("MASTER_PORT", ""))
    after = words[2:] if dry else words[1:]
    resume = shlex.join(["bash", "scripts/msrun/msrun_launcher.sh", f"{text} {shlex.join(RESUME)}", *after])
    launch(layout, from_text(text), dry, resume, _restarts(os.environ.get(MAX_RESTARTS, "0")))
