"""A connection between the launchers of two machines: JSON objects, one a line."""

import json
import socket
import threading
import time
from collections.abc import Callable

LONGEST_LINE = 4 << 20
SEND_SECONDS = 5.0
SILENCE_SECONDS = 12.0


class Link:
    """An open connection; `state` is what the other side told last, `closed` whether its end was seen."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.file = connection.makefile("rb")
        self.state: dict = {}
        self.closed = False
        self.heard = time.monotonic()
        connection.settimeout(SEND_SECONDS)

    def send(self, message: dict) -> None:
        """Send a message; a connection that takes none any more is closed."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.close()

    def receive(self) -> dict | None:
        """Return the next message, None at the end of the connection, or when what comes is no message of ours."""
        try:
            line = self.file.readline(LONGEST_LINE)
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        self.heard = time.monotonic()
        return message if isinstance(message, dict) else None

    def follow(self, take: Callable[[dict], None]) -> None:
        """Hand every message to `take` in a thread, until the connection ends or nothing comes any more."""
        self.connection.settimeout(SILENCE_SECONDS)
        threading.Thread(target=self._follow, args=(take,), daemon=True).start()

    def _follow(self, take: Callable[[dict], None]) -> None:
        while (message := self.receive()) is not None:
            take(message)
        self.close()

    def silent(self) -> bool:
        """Whether nothing was heard for so long that the machine or the network must be gone."""
        return time.monotonic() - self.heard > SILENCE_SECONDS

    def close(self) -> None:
        """Close the connection."""
        self.closed = True
        # It also wakes the thread that reads.
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.connection.close()
