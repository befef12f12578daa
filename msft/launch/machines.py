"""What the launchers of a job's machines tell each other, so that the job starts and ends as a whole.

The first machine listens on the port after the job's; the others connect to it. Every second each tells its state, and
the first one passes all of them on. Nothing depends on the clocks of two machines: what is told are counts and ages.
"""

import socket
import threading
import time
import uuid

from msft import console
from msft.errors import InputError, RunError
from msft.launch.layout import Layout
from msft.launch.link import SILENCE_SECONDS, Link

TICK_SECONDS = 0.5
NOTE_SECONDS = 10.0
WELCOME_SECONDS = 5.0


class Machines:
    """This machine's place among the others; with one machine there is nobody to talk to.

    A state is a dictionary; the keys `host`, `attempt`, `ready` and `over` are set here, the others by `tell`.
    """

    def __init__(self, layout: Layout, port: int, max_restarts: int = 0):
        self.layout, self.port = layout, port + 1
        # What all machines have to be told alike.
        self.facts = {
            "processes": layout.workers,
            "processes on a machine": layout.local_workers,
            "restarts at most": max_restarts,
        }
        self.state: dict = {"host": socket.gethostname()}
        self.links: dict[int, Link] = {}
        self.lock = threading.Lock()
        self.refused = ""
        self.listener: socket.socket | None = None
        self.open = layout.nodes > 1

    def __enter__(self) -> "Machines":
        if self.open:
            if self.layout.node_rank == 0:
                self.listener = _listen(self.port)
                threading.Thread(target=self._accept, daemon=True).start()
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.state["over"] = True
        self.open = False
        if self.listener:
            self.listener.close()
        for link in self._links():
            link.send(self._message())
            link.close()

    def _links(self) -> list[Link]:
        with self.lock:
            return list(self.links.values())

    def _tick(self) -> None:
        while self.open:
            for link in self._links():
                if not link.closed:
                    link.send(self._message())
            time.sleep(TICK_SECONDS)

    def _message(self) -> dict:
        """This machine's state, or on the first machine those of all."""
        if self.layout.node_rank:
            return self.state
        with self.lock:
            return {"0": self.state} | {str(node): link.state for node, link in self.links.items() if link.state}

    # Coming together

    def meet(self, resume: bool) -> bool:
        """Wait until the launchers of all machines are ready, at most `layout.timeout` seconds; then the job starts.

        Returns the first machine's `resume`. Raises InputError when the machines were told different layouts,
        RunError when one has not come in time or the first one has ended for good.
        """
        if self.layout.nodes == 1:
            return resume
        token = uuid.uuid4().hex
        self.state = {"host": self.state["host"], "ready": token}
        deadline, noted = time.monotonic() + self.layout.timeout, time.monotonic() + NOTE_SECONDS
        while True:
            start = self._start(resume) if self.layout.node_rank == 0 else self._started(token)
            if start is not None:
                return start
            if time.monotonic() > deadline:
                raise RunError(f"{self._missing()} within {self.layout.timeout} seconds, so the job was not started")
            if time.monotonic() > noted:
                console.note(f"waiting: {self._missing()} yet")
                noted = float("inf")
            time.sleep(TICK_SECONDS / 2)

    def _start(self, resume: bool) -> bool | None:
        """On the first machine: start when all the others are ready."""
        with self.lock:
            ready = {str(node): link.state.get("ready") for node, link in self.links.items() if not link.closed}
        if len(ready) < self.layout.nodes - 1 or not all(ready.values()):
            return None
        self.state = {"host": self.state["host"], "attempt": uuid.uuid4().hex, "starts": ready, "resume": resume}
        return resume

    def _started(self, token: str) -> bool | None:
        """On another machine: whether the first one has started this machine too."""
        link = self.links.get(0)
        first = link.state.get("0", {}) if link else {}
        if self.refused:
            raise InputError(self.refused)
        if first.get("over"):
            raise RunError(f"machine 0 ({first['host']}) has ended the job")
        if link is None or link.closed:
            self._connect()
            return None
        if first.get("starts", {}).get(str(self.layout.node_rank)) != token:
            return None
        self.state = {"host": self.state["host"], "attempt": first["attempt"]}
        return first["resume"]

    def _missing(self) -> str:
        if self.layout.node_rank:
            return f"machine 0 ({self.layout.master_addr}, port {self.port}) was not ready"
        with self.lock:
            there = {node for node, link in self.links.items() if not link.closed}
        absent = [str(node) for node in range(1, self.layout.nodes) if node not in there]
        return f"no launcher of machine {', '.join(absent)} of {self.layout.nodes} (counted from 0) has come"

    def _connect(self) -> None:
        try:
            connection = socket.create_connection((self.layout.master_addr, self.port), timeout=WELCOME_SECONDS)
        except OSError:
            return
        link = Link(connection)
        link.send({"machine": self.layout.node_rank, "facts": self.facts})
        welcome = link.receive() or {}
        self.refused = welcome.get("refused", "")
        if "welcome" not in welcome:
            return link.close()
        self.links[0] = link
        link.follow(lambda states: setattr(link, "state", states))

    def _accept(self) -> None:
        while self.open:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._greet, args=(Link(connection),), daemon=True).start()

    def _greet(self, link: Link) -> None:
        hello = link.receive() or {}
        node, facts = hello.get("machine"), hello.get("facts")
        if not isinstance(node, int) or not 0 < node < self.layout.nodes or not isinstance(facts, dict):
            if hello:
                link.send({"refused": f"machine {node}: this job has {self.layout.nodes} machines, numbered from 0"})
            return link.close()
        if problem := self._problem(node, facts):
            console.note(f"a launcher was sent away: {problem}")
            link.send({"refused": problem})
            return link.close()
        link.send({"welcome": True})
        with self.lock:
            self.links[node] = link
        link.follow(lambda state: setattr(link, "state", state))

    def _problem(self, node: int, facts: dict) -> str:
        for name, own in self.facts.items():
            if facts.get(name) != own:
                return f"machine {node} was told {facts.get(name)} {name}, machine 0 was told {own}"
        old = self.links.get(node)
        if old and not old.closed and not old.silent():
            return f"node rank {node} is taken: another machine ({old.state.get('host')}) has it already"
        return ""

    # While the job runs

    def tell(self, **facts) -> None:
        """Change this machine's state."""
        self.state = self.state | facts

    def others(self) -> dict[int, dict]:
        """Return the states of the other machines, as they are in this attempt."""
        attempt = self.state.get("attempt")
        if self.layout.node_rank == 0:
            with self.lock:
                states = {node: link.state for node, link in self.links.items()}
        else:
            link = self.links.get(0)
            states = {int(node): state for node, state in (link.state if link else {}).items()}
        own = self.layout.node_rank
        return {node: state for node, state in states.items() if node != own and state.get("attempt") == attempt}

    def lost(self) -> str:
        """Say which machine has left the job without a word; "" when none has."""
        with self.lock:
            links = dict(self.links)
        for node, link in links.items():
            state = link.state.get("0", {}) if self.layout.node_rank else link.state
            who = f"machine {node} ({state.get('host', self.layout.master_addr)})"
            if link.silent():
                return f"{who} was not heard for {SILENCE_SECONDS:.0f} s: it or the network is down"
            if link.closed and not state.get("over"):
                return f"{who} has left: its launcher was killed"
            if link.closed and not state.get("done"):
                return f"{who} has ended the job"
            if state.get("attempt") != self.state["attempt"] and state.get("ready") != self._token(node):
                return f"{who} was started anew"
        return ""

    def _token(self, node: int) -> str:
        """What a machine said that this attempt was started with: it says so until it has heard of the start."""
        return self.state.get("starts", {}).get(str(node), "")


def _listen(port: int) -> socket.socket:
    try:
        # Both IPv6 and IPv4 where there is IPv6.
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise InputError(
            f"port {port} is in use on this machine; launchers talk to each other on the port after the job's "
            f"({port - 1}): choose another ({error.strerror})"
        ) from None
