"""A TCP proxy before a Redis, whose connections can go silent, be cut, or lead to another one."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

#: Looks at bytes on their way, with `True` for those to Redis; where it says `False` they do not arrive, and their
#: connection is cut.
Rule = Callable[[bytes, bool], bool]


class Proxy:
    """`url` leads through the proxy to the Redis of the URL that it was made with, `unix://` or `redis://`.

    One thread carries all of it, so that what comes in is in order; for tests, not for speed.
    """

    def __init__(self, url: str) -> None:
        self._to = url
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://{urlsplit(url).netloc.rpartition('@')[0]}@127.0.0.1:{self._door.getsockname()[1]}/0"
        self._lock = threading.Lock()
        #: Both ends of each connection.
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._silent: set[socket.socket] = set()
        #: Whether new connections go silent at once.
        self.dead = False
        self.rule: Rule | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._door, selectors.EVENT_READ)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        self._thread.join()
        self.cut()
        self._door.close()

    def lead_to(self, url: str) -> None:
        """From here on new connections lead to another server, of the same password; those that there are stay."""
        self._to = url

    def go_silent(self) -> None:
        """From here on nothing comes through the connections there are, and neither end hears of it."""
        with self._lock:
            self._silent.update(end for pair in self._pairs for end in pair)

    def speak(self) -> None:
        """All that was silent goes on; nothing was lost of it."""
        with self._lock:
            self._silent.clear()

    def cut(self) -> None:
        """End every connection."""
        with self._lock:
            for one, other in self._pairs:
                self._forget(one, other)
            self._pairs.clear()

    def _run(self) -> None:
        while not self._stopped:
            for key, _ in self._selector.select(0.02):
                with self._lock:
                    if key.fileobj is self._door:
                        self._accept()
                    elif (
                        isinstance(end := key.fileobj, socket.socket) and end.fileno() >= 0 and end not in self._silent
                    ):
                        self._forward(end, key.data)
            if self._silent:
                # What is silent is readable all the time.
                threading.Event().wait(0.01)

    def _accept(self) -> None:
        one, _ = self._door.accept()
        try:
            other = _connected(self._to)
        except OSError:
            one.close()
            return
        self._pairs.append((one, other))
        self._selector.register(one, selectors.EVENT_READ, other)
        self._selector.register(other, selectors.EVENT_READ, one)
        if self.dead:
            self._silent |= {one, other}

    def _forward(self, one: socket.socket, other: socket.socket) -> None:
        try:
            data = one.recv(65536)
            if self.rule is not None and not self.rule(data, one.family is not socket.AF_UNIX):
                data = b""
            other.sendall(data)
        except OSError:
            data = b""
        if not data:
            self._pairs = [pair for pair in self._pairs if one not in pair]
            self._forget(one, other)

    def _forget(self, *ends: socket.socket) -> None:
        for end in ends:
            self._silent.discard(end)
            if end.fileno() >= 0:
                self._selector.unregister(end)
                end.close()


def _connected(url: str) -> socket.socket:
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return socket.create_connection((parts.hostname, parts.port or 6379))
    to = socket.socket(socket.AF_UNIX)
    try:
        to.connect(parts.path)
    except OSError:
        to.close()
        raise
    return to
