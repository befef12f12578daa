"""From a layout and a program to a finished job."""

import os
from pathlib import Path

from msft import console
from msft.config import deepspeed, derive, semi_auto
from msft.config.layout import layout as shared
from msft.launch import RESUME_COMMAND, restart
from msft.launch.background import detach
from msft.launch.command import RANK_VARIABLES, build
from msft.launch.layout import Layout, check, choose_port
from msft.launch.machines import Machines
from msft.launch.program import Program
from msft.launch.supervise import supervise


def launch(layout: Layout, program: Program, dry: bool, resume_command: str, max_restarts: int = 0) -> None:
    """Run a program on a layout's processes and wait for them, or leave them in the background (`layout.wait` False).

    `dry` only prints the command line. `resume_command` is what a stopped job tells its user to type. After a
    failure the job is started again, at most `max_restarts` times in a row without progress. Raises InputError before
    a process is started, RunError when one fails.
    """
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    check(layout)
    if layout.workers > 1:
        program = program.parallel()
        spec = derive.model_spec(program.recipe)
        shared(program.recipe, spec, layout.workers)
        deepspeed.check(program.recipe, spec, layout.workers)
        if dry and semi_auto.is_asked(program.recipe, layout.workers):
            console.say("\n".join(semi_auto.lines(semi_auto.plan(program.recipe, spec, layout.workers), spec)))
    port = choose_port(layout)
    command = build(layout, port, program.recipe.backend, program.words)
    if dry:
        console.say(str(command))
        return
    layout.log_dir.mkdir(parents=True, exist_ok=True)
    layout.launcher_log.unlink(missing_ok=True)
    console.note(f"starting {_what(layout, program)}; logs in {layout.log_dir}")
    if not layout.wait:
        process = detach(layout.launcher_log)
        if process:
            console.note(f"running in the background: `tail -f {layout.logs[0]}` shows it, `kill {process}` ends it")
            return
    os.environ[RESUME_COMMAND] = resume_command
    _run(layout, program, port, max_restarts)


def _run(layout: Layout, program: Program, port: int, max_restarts: int) -> None:
    backend, hang_timeout = program.recipe.backend, program.recipe.hang_timeout
    with Machines(layout, port, max_restarts) as machines:

        def attempt(resume: bool) -> None:
            words = program.words
            if machines.meet(resume):
                words += ("--resume_training", "True")
            # Meanwhile another job may have taken a port that nobody asked for.
            own = choose_port(layout) if layout.nodes == 1 and layout.master_port is None else port
            supervise(build(layout, own, backend, words), layout, hang_timeout, machines)

        restart.run(attempt, lambda: _newest(program), max_restarts, layout)


def _newest(program: Program) -> int:
    """The step of a job's newest whole checkpoint, 0 when there is none."""
    from msft.train import checkpoint

    path = checkpoint.latest_whole(Path(program.recipe.output_dir) / checkpoint.FOLDER)
    return checkpoint.read_state(path).step if path else 0


def _what(layout: Layout, program: Program) -> str:
    count = "1 process" if layout.workers == 1 else f"{layout.workers} processes"
    where = "" if layout.nodes == 1 else f" ({layout.local_workers} here, machine {layout.node_rank} of {layout.nodes})"
    return f"{count}{where} of {program.recipe.backend}"
