"""The machines that a hostfile or a Slurm allocation names, and the layout that follows from them."""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from msft.errors import InputError

ONE_LAUNCHER = "start one launcher on each machine: srun --ntasks-per-node=1 msft launch ..."


@dataclass(frozen=True)
class Cluster:
    """Machines in order, processes on each (None: not said), which of them this one is (None: not known), and who
    says so."""

    hosts: tuple[str, ...]
    slots: int | None
    own: int | None
    source: str


@dataclass(frozen=True)
class Given:
    """What flags or variables say themselves; None where they say nothing."""

    nnodes: int | None = None
    nproc_per_node: int | None = None
    node_rank: int | None = None
    master_addr: str | None = None


def arrange(cluster: Cluster, given: Given) -> Given:
    """Return what was given, completed by the cluster; raises InputError naming every contradiction.

    Fewer machines or processes than there are is no contradiction: the first ones are taken.
    """
    count, source = len(cluster.hosts), cluster.source
    nodes = count if given.nnodes is None else given.nnodes
    rank = cluster.own if given.node_rank is None else given.node_rank
    problems = []
    if nodes > count:
        problems.append(f"--nnodes {nodes}: {source} names {count}: {', '.join(cluster.hosts)}")
    if cluster.slots and (given.nproc_per_node or 0) > cluster.slots:
        problems.append(f"--nproc_per_node {given.nproc_per_node}: {source} has {cluster.slots} on each machine")
    if rank is None:
        problems.append(f"{source}: {_unknown(cluster)}")
    elif cluster.own is not None and rank != cluster.own:
        own = f"{cluster.own} ({cluster.hosts[cluster.own]})"
        problems.append(f"--node_rank {rank}: this machine is number {own} of {source}, counted from 0")
    elif nodes <= rank < count:
        problems.append(f"--nnodes {nodes}: this machine is number {rank} of {source}, counted from 0")
    if problems:
        raise InputError(*problems)
    first = "127.0.0.1" if nodes == 1 else cluster.hosts[0]
    return Given(nodes, given.nproc_per_node or cluster.slots, rank, given.master_addr or first)


def _unknown(cluster: Cluster) -> str:
    if cluster.source.startswith("Slurm"):
        return f"SLURM_NODEID is not set, so this machine's number is not known: {ONE_LAUNCHER}"
    return f"this machine ({socket.gethostname()}) is none of {', '.join(cluster.hosts)}: name it, or give --node_rank"


def read_hostfile(path: Path) -> Cluster:
    """Read `host slots=8` lines (DeepSpeed, Open MPI; # begins a comment); this machine is found by name or address.

    Raises InputError naming every line that is not so, hosts named twice, and unequal slots.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--hostfile {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    slots, problems = {}, []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\S+)\s+slots\s*=\s*([1-9]\d{0,5})", words)
        if words and not match:
            problems.append(f"{path}:{number}: {words!r} is not of the form 'host slots=8'")
        elif match and match[1] in slots:
            problems.append(f"{path}:{number}: {match[1]} is named twice")
        elif match:
            slots[match[1]] = int(match[2])
    if not slots and not problems:
        problems.append(f"{path}: names no machine (lines of the form 'host slots=8')")
    if problems:
        raise InputError(*problems)
    check_equal(slots, str(path))
    return Cluster(tuple(slots), next(iter(slots.values())), _own(list(slots), path), str(path))


def check_equal(slots: Mapping[str, int], source: str) -> None:
    """Raise InputError naming the machines when they have unequal numbers of processes."""
    if len(set(slots.values())) > 1:
        told = ", ".join(f"{host} {number}" for host, number in slots.items())
        raise InputError(
            f"{source}: unequal slots ({told}): msrun and torchrun deal the ranks out in equal parts, and every rank "
            "takes an equal share of a batch; give each machine the same number"
        )


def _own(hosts: list[str], path: Path) -> int | None:
    """Which host is this machine: by its name, long or short, or else by an address that it has."""
    names = {socket.gethostname(), socket.getfqdn(), socket.gethostname().split(".")[0]}
    found = [number for number, host in enumerate(hosts) if host in names]
    found = found or [number for number, host in enumerate(hosts) if _is_here(host)]
    if len(found) > 1:
        raise InputError(f"{path}: {' and '.join(hosts[number] for number in found)} are both this machine")
    return found[0] if found else None


def _is_here(host: str) -> bool:
    """Whether a name or address is this machine's: only an own address can be bound."""
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, _, _, address in addresses:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind((address[0], 0))
            except OSError:
                continue
            return True
    return False
