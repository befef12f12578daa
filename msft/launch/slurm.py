"""The machines of a Slurm allocation, from the variables that Slurm sets."""

import re
from collections.abc import Mapping

from msft.errors import InputError
from msft.launch.cluster import ONE_LAUNCHER, Cluster, check_equal


def from_slurm(variables: Mapping[str, str]) -> Cluster:
    """Return the machines of the Slurm job or step that this process runs in, from its environment variables.

    Raises InputError when they do not fit together, for unequal tasks, and in all but a machine's first task.
    """
    where = "SLURM_STEP_NODELIST" if variables.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NODELIST"
    hosts = expand(variables[where], where)
    nodes = _number(variables, "SLURM_STEP_NUM_NODES" if where.startswith("SLURM_STEP") else "SLURM_NNODES")
    if nodes is not None and nodes != len(hosts):
        raise InputError(f"Slurm: there are {nodes} machines, but {where}={variables[where]} names {len(hosts)}")
    if _number(variables, "SLURM_LOCALID"):
        raise InputError(f"Slurm: this is task {variables['SLURM_LOCALID']} of its machine: {ONE_LAUNCHER}")
    own = _number(variables, "SLURM_NODEID")
    if own is not None and own >= len(hosts):
        raise InputError(f"Slurm: SLURM_NODEID is {own}, but {where}={variables[where]} names {len(hosts)} machines")
    if own is None and len(hosts) == 1:
        own = 0
    tasks = _tasks(variables, hosts)
    # One task a machine is the launcher itself: it says nothing about the processes that are wanted.
    return Cluster(tuple(hosts), tasks if tasks != 1 else None, own, f"Slurm ({where})")


def _tasks(variables: Mapping[str, str], hosts: list[str]) -> int | None:
    if (each := _number(variables, "SLURM_NTASKS_PER_NODE")) is not None:
        return each
    name = "SLURM_STEP_TASKS_PER_NODE" if variables.get("SLURM_STEP_TASKS_PER_NODE") else "SLURM_TASKS_PER_NODE"
    text = variables.get(name, "")
    if not text:
        return None
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    counts = [int(part[1]) for part in parts if part for _ in range(min(int(part[2] or 1), len(hosts) + 1))]
    if not all(parts) or len(counts) != len(hosts):
        raise InputError(f"Slurm: {name}={text} does not fit {len(hosts)} machines")
    check_equal(dict(zip(hosts, counts, strict=True)), f"Slurm ({name}={text})")
    return counts[0]


def _number(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name, "")
    if text and not (text.isascii() and text.isdigit()):
        raise InputError(f"Slurm: {name}={text} is not a number")
    return int(text) if text else None


def expand(text: str, source: str) -> list[str]:
    """Return the hosts of a Slurm node list such as `node[01-03,07],login`; raises InputError for what is none."""
    parts = re.findall(r"(?:[^,\[\]\s]|\[[\d,-]+\])+", text)
    if not parts or ",".join(parts) != text:
        raise InputError(f"Slurm: {source}={text} is not a list of machines such as node[01-03,07]")
    hosts = [host for part in parts for host in _expand(part, source)]
    if len(set(hosts)) < len(hosts):
        raise InputError(f"Slurm: {source}={text} names a machine twice")
    return hosts


def _expand(part: str, source: str) -> list[str]:
    match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if not match:
        return [part]
    before, ranges, after = match.groups()
    return [
        f"{before}{n}{rest}" for r in ranges.split(",") for n in _range(r, source) for rest in _expand(after, source)
    ]


def _range(text: str, source: str) -> list[str]:
    """The numbers of `01-03` or `07`, as wide as the first one is written."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < first + 100_000:
        raise InputError(f"Slurm: {source}: {text!r} is not a range of numbers such as 01-03")
    return [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
