"""The words of `msrun_launcher.sh`, as MindFormers takes them."""

from collections.abc import Sequence
from pathlib import Path

from msft.errors import InputError
from msft.launch.layout import Layout

FORMS = {
    1: (),
    2: ("WORKER_NUM",),
    6: ("WORKER_NUM", "MASTER_PORT", "LOG_DIR", "JOIN", "CLUSTER_TIME_OUT"),
    9: (
        "WORKER_NUM",
        "LOCAL_WORKER",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "LOG_DIR",
        "JOIN",
        "CLUSTER_TIME_OUT",
    ),
}
DEFAULT_WORKERS = 8
USAGE = "\n".join(
    [
        "usage: bash scripts/msrun/msrun_launcher.sh with 1, 2, 6 or 9 words:",
        *(f"  {count} words: {' '.join(('COMMAND', *names))}" for count, names in FORMS.items()),
        'COMMAND is one word in quotes, such as "run_finetune.py --config X.yaml". Without a WORKER_NUM there are 8,',
        "on this machine. JOIN True, and the forms without JOIN, wait for the end and fail when a worker fails; JOIN",
        "False returns at once. CLUSTER_TIME_OUT: seconds that workers wait for each other at the start.",
        "MASTER_PORT=N (a variable): the port of the forms without one; 8118, or a free one.",
        "MSFT_MAX_RESTARTS=N (a variable): after a failure, start again from the last whole checkpoint, as msft launch",
        "--max_restarts does; it has the other options for several machines too.",
    ]
)

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def parse(words: Sequence[str], port: str = "") -> tuple[str, Layout]:
    """Return the command and the layout; raises InputError with the usage for any other number of words.

    `port` is what the environment's MASTER_PORT says, for the forms that have no such word ("": nothing).
    """
    if len(words) not in FORMS:
        raise InputError(f"these are {len(words)} words\n{USAGE}")
    given = ({"MASTER_PORT": port} if port else {}) | dict(zip(FORMS[len(words)], words[1:], strict=True))
    problems = [problem for name, word in given.items() if (problem := _problem(name, word))]
    if problems:
        raise InputError(*problems)
    return words[0], _layout(given)


def _problem(name: str, word: str) -> str | None:
    if name == "JOIN":
        return None if word.lower() in _BOOLEANS else f"JOIN: {word!r} is not True or False"
    if name in ("MASTER_ADDR", "LOG_DIR"):
        return None if word else f"{name} is empty"
    return None if word.isascii() and word.isdigit() else f"{name}: {word!r} is not a number"


def _layout(given: dict[str, str]) -> Layout:
    workers = int(given.get("WORKER_NUM", DEFAULT_WORKERS))
    local_workers = int(given.get("LOCAL_WORKER", workers))
    settings = {}
    # MindFormers ignores address and node rank where one machine holds all workers.
    if local_workers != workers:
        settings |= {"master_addr": given["MASTER_ADDR"], "node_rank": int(given["NODE_RANK"])}
    if "MASTER_PORT" in given:
        settings["master_port"] = int(given["MASTER_PORT"])
    if "LOG_DIR" in given:
        settings |= {
            "log_dir": Path(given["LOG_DIR"]),
            "wait": _BOOLEANS[given["JOIN"].lower()],
            "timeout": int(given["CLUSTER_TIME_OUT"]),
        }
    return Layout(workers, local_workers, **settings)
