"""Machines on one machine: network namespaces with addresses and host names of their own, joined by a bridge.

Needs root and `ip` (iproute2). All addresses are inside the namespaces; the machine's own network is not touched.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.launch.jobs import ROOT, environment, within

PREFIX = "msft-test"


def possible() -> bool:
    """Whether namespaces can be made here."""
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    name = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


def ip(*words, inside: str = "") -> None:
    """Run `ip`, in a namespace if one is named."""
    subprocess.run(["ip", *(("-n", inside) if inside else ()), *words], check=True, capture_output=True)


class Network:
    """Machines `node0`, `node1`, ... with the addresses 10.77.0.1, 10.77.0.2, ...; removed at the end of `with`."""

    def __init__(self, folder: Path, machines: int = 2):
        self.folder = folder
        self.names = [f"{PREFIX}-{os.getpid()}-{number}" for number in range(machines)]
        self.bridge = f"{PREFIX}-{os.getpid()}-bridge"
        self.started: list[subprocess.Popen] = []

    def __enter__(self) -> "Network":
        _remove_leftovers()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def _make(self) -> None:
        ip("netns", "add", self.bridge)
        ip("link", "add", "bridge", "type", "bridge", inside=self.bridge)
        ip("link", "set", "bridge", "up", inside=self.bridge)
        hosts = ["127.0.0.1 localhost"]
        for number, name in enumerate(self.names):
            ip("netns", "add", name)
            peer = ("peer", "name", f"to{number}", "netns", self.bridge)
            ip("link", "add", "eth0", "netns", name, "type", "veth", *peer)
            ip("link", "set", f"to{number}", "master", "bridge", "up", inside=self.bridge)
            ip("address", "add", f"{self.address(number)}/24", "dev", "eth0", inside=name)
            for device in ("lo", "eth0"):
                ip("link", "set", device, "up", inside=name)
            hosts.append(f"{self.address(number)} node{number}")
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    def __exit__(self, *error) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in [*self.names, self.bridge]:
            _delete(name)
        for process in self.started:
            process.kill()
            process.communicate()

    def address(self, number: int) -> str:
        """A machine's address."""
        return f"10.77.0.{number + 1}"

    def start(self, number: int, *words, clock: int = 0, **variables: str) -> subprocess.Popen:
        """Start a command on a machine, in a folder of its own; `clock` seconds are added to its monotonic clock."""
        folder = self.folder / f"node{number}"
        folder.mkdir(exist_ok=True)
        inside = f'hostname node{number}; mount --bind "$0" /etc/hosts; cd "$1"; shift; exec "$@"'
        shift = ["--time", "--fork", "--kill-child", "--monotonic", str(clock)] if clock else []
        unshare = ["unshare", "--uts", "--mount", *shift, "sh", "-c", inside, str(self.folder / "hosts"), str(folder)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], *unshare, *words],
            env=environment(PYTHON=sys.executable, PYTHONPATH=str(ROOT), **variables),
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        self.started.append(process)
        return process

    def cut(self, number: int) -> None:
        """Cut a machine's link: packets are lost, and nobody is told."""
        ip("link", "set", f"to{number}", "nomaster", inside=self.bridge)

    def join(self, number: int) -> None:
        """Mend a machine's link."""
        ip("link", "set", f"to{number}", "master", "bridge", inside=self.bridge)

    def kill(self, number: int) -> None:
        """Kill all that runs on a machine, as when its power fails; what is killed says no goodbye."""
        self.cut(number)
        _kill(self.names[number])
        assert within(10, lambda: not processes(self.names[number]))
        self.join(number)


def processes(name: str) -> list[int]:
    """The ids of the processes in a namespace."""
    done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def _kill(name: str) -> None:
    for pid in processes(name):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _delete(name: str) -> None:
    _kill(name)
    within(10, lambda: not processes(name))
    subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _remove_leftovers() -> None:
    """Remove the namespaces of test processes that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name, pid in re.findall(rf"^({PREFIX}-(\d+)-\w+)", listed, re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            _delete(name)
