"""Which processes run where."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from msft.errors import InputError

DEFAULT_PORT = 8118
LAST_PORT = 65535
ADDRESS = "127.0.0.1"
LOG_DIR = "output/msrun_log"


@dataclass(frozen=True)
class Layout:
    """`workers` processes in all, `local_workers` on each machine; this is machine number `node_rank`.

    `master_port` None is 8118, or any free port when that is taken and there is one machine. `timeout` is how many
    seconds the processes wait for each other at the start. `wait` False leaves them running in the background.
    """

    workers: int
    local_workers: int
    master_addr: str = ADDRESS
    master_port: int | None = None
    node_rank: int = 0
    log_dir: Path = Path(LOG_DIR)
    wait: bool = True
    timeout: int = 7200

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return self.workers // self.local_workers

    @property
    def ranks(self) -> range:
        """The ranks on this machine."""
        first = self.node_rank * self.local_workers
        return range(first, first + self.local_workers)

    @property
    def logs(self) -> list[Path]:
        """This machine's logs: its ranks' in order, MindSpore's scheduler's (on the first machine), the launcher's."""
        names = [f"worker_{rank}" for rank in self.ranks] + ["scheduler"] * (self.node_rank == 0)
        return [*(self.log_dir / f"{name}.log" for name in names), self.launcher_log]

    @property
    def launcher_log(self) -> Path:
        """What msrun or torchrun itself says on this machine (log folders may be shared)."""
        return self.log_dir / ("launcher.log" if self.node_rank == 0 else f"launcher_{self.node_rank}.log")


def check(layout: Layout) -> None:
    """Raise InputError naming everything about a layout that cannot be."""
    problems = list(_problems(layout)) or list(_unknown_address(layout))
    if problems:
        raise InputError(*problems)


def _problems(layout: Layout) -> Iterator[str]:
    counts = {"processes": layout.workers, "processes on a machine": layout.local_workers, "seconds": layout.timeout}
    yield from (f"{count} {what}: there must be 1 or more" for what, count in counts.items() if count < 1)
    last = LAST_PORT if layout.workers == layout.local_workers else LAST_PORT - 1
    if layout.master_port is not None and not 1 <= layout.master_port <= last:
        yield f"port {layout.master_port}: ports are numbers from 1 to {last}"
    if layout.workers < 1 or layout.local_workers < 1:
        return
    if layout.workers % layout.local_workers:
        yield f"{layout.workers} processes cannot be dealt to machines with {layout.local_workers} each"
    elif not 0 <= layout.node_rank < layout.nodes:
        dealt = f"{layout.workers} processes, {layout.local_workers} on each machine, are {layout.nodes} machines"
        yield f"node rank {layout.node_rank}: {dealt}, numbered from 0"


def choose_port(layout: Layout) -> int:
    """Return the port the processes meet at; on the first of their machines, raise InputError when it is in use."""
    if layout.node_rank or layout.workers == 1:
        return layout.master_port or DEFAULT_PORT
    if layout.master_port is None and layout.nodes == 1:
        return DEFAULT_PORT if _is_free(DEFAULT_PORT) else _free_port()
    port = layout.master_port or DEFAULT_PORT
    if layout.nodes > 1 and not _is_free(port + 1):
        raise InputError(
            f"port {port + 1} is in use on this machine (the launchers of several machines talk to each other on the "
            f"port after the job's): choose another than {port}"
        )
    if not _is_free(port):
        raise InputError(
            f"port {port} is in use on this machine, perhaps by another run: choose another, {_free_port()} is free"
        )
    return port


def _unknown_address(layout: Layout) -> Iterator[str]:
    try:
        socket.getaddrinfo(layout.master_addr, None)
    except (OSError, UnicodeError):
        yield f"{layout.master_addr}: no machine of this name or address is known here"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Without it, connections of a run that has just ended would still hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
