"""What the host and PID 1 of a sandbox say to each other: frames, each a kind, a length and a body.

This file runs on both sides. Inside there is nothing but the standard library, and each import costs every sandbox its
time, so this uses built-in modules only.

The host sends `PREPARE`, then for each input file a `FILE` and its `DATA`, then `JOB`, of which an empty one is the
last; closing its end ends the sandbox. PID 1 sends `UP` as soon as it runs (the host checks it from outside before it
sends anything of a job), `READY` when a job may come, `STDOUT` and `STDERR` as they come, `END` with how
it ended, for each output file a `FILE` and its `DATA`, and `DONE`. The host trusts PID 1 no further than that:
everything is checked again.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PREPARE = b"P"
FILE = b"F"
DATA = b"D"
JOB = b"J"

UP = b"U"
READY = b"R"
STDOUT = b"o"
STDERR = b"e"
END = b"E"
DONE = b"Z"

#: The longest body. Longer things are sent as several `DATA`.
LONGEST = 256 * 1024

_HEAD = 5


class Broken(Exception):
    """The bytes are no frames."""


def frame(kind: bytes, body: bytes = b"") -> bytes:
    return kind + len(body).to_bytes(4, "big") + body


def pieces(kind: bytes, body: bytes) -> Iterator[bytes]:
    """Frames of one kind that hold all of `body` together; none where it is empty."""
    for start in range(0, len(body), LONGEST):
        yield frame(kind, body[start : start + LONGEST])


class Frames:
    """Makes frames of bytes as they come."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Every frame that is whole by now. Raises `Broken` for one that is longer than any may be."""
        self._held += data
        while len(self._held) >= _HEAD:
            end = _HEAD + int.from_bytes(self._held[1:_HEAD], "big")
            if end > _HEAD + LONGEST:
                raise Broken("a frame is longer than any may be")
            if len(self._held) < end:
                return
            kind, body = bytes(self._held[:1]), bytes(self._held[_HEAD:end])
            del self._held[:end]
            yield kind, body
