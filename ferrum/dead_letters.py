"""Messages that workers dropped: what they were, why, and the way back into their queue.

Keys, all under `ferrum:{dead-letters}`:

    :list   stream  one entry per letter, oldest first, without its text
    :texts  hash    the text of each as it stood in its queue
    :bytes  their length together
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any, Final

import redis
from pydantic import BaseModel, ConfigDict

from ferrum.errors import Conflict, NotFound
from ferrum.messages import MAX_BYTES, Refused, renewed
from ferrum.scripts import Connection

#: The most that are kept; the oldest make room.
MAX_LETTERS: Final = 1_000
#: The most that their texts have together, in bytes.
MAX_KEPT_BYTES: Final = 32 * 1024 * 1024
#: Of a message that is too long to be one, so much is kept.
SAMPLE: Final = 1_000
#: An answer is kept for as long as Celery keeps results, in seconds.
_ANSWER_LIFE_S: Final = 86_400
#: What stands between a queue's name and its lane in the name of a list.
_LANE: Final = "\x06\x16"

_BASE: Final = "ferrum:{dead-letters}"
_ID: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}", re.ASCII)


class DeadLetter(BaseModel):
    """A message that was dropped."""

    model_config = ConfigDict(frozen=True)

    id: str
    #: When, in seconds since 1970 by the clock of Redis.
    at: float
    queue: str
    #: The list that it stood in: the queue, and its lane.
    list: str
    reason: str
    #: The task and the id that it names; `None` where they cannot be read.
    task: str | None
    task_id: str | None
    #: Bytes of the message.
    size: int
    #: Whether all of it was kept; only then it can be replayed.
    whole: bool


class DeadLetters(Connection):
    """The dropped messages of one Redis. Safe to share between threads."""

    def __init__(self, url: str, *, patience_s: float = 5.0) -> None:
        super().__init__(url, patience_s=patience_s, folder="dead_letters")

    def all(self) -> list[DeadLetter]:
        """The dead letters that are kept, newest first."""
        found: Any = self._patiently(lambda: self._redis.xrevrange(f"{_BASE}:list"))
        return [_letter(id_, fields) for id_, fields in found]

    def find(self, id: str) -> tuple[DeadLetter, str]:
        """One of them, and its text. Raises `NotFound`."""
        if not _ID.fullmatch(id):
            raise _not_there(id)
        found: Any = self._patiently(lambda: self._redis.xrange(f"{_BASE}:list", id, id))
        text = self._patiently(lambda: self._redis.hget(f"{_BASE}:texts", id))
        if not found or text is None:
            raise _not_there(id)
        return _letter(*found[0]), str(text)

    def replay(self, id: str) -> DeadLetter:
        """Put it back into its queue, and forget it here.

        Its deliveries are counted from the start. Raises `NotFound`, and `Conflict` where not all was kept or where
        something else is in place of its queue.
        """
        letter, text = self.find(id)
        if not letter.whole:
            raise Conflict(f"dead letter {id} is too long, or no text, and was not kept whole: it cannot be replayed")
        # Pushed before it is forgotten: a message that comes twice starts one run, and one that is lost none.
        try:
            self._patiently(lambda: self._redis.lpush(letter.list, renewed(text)))
        except redis.exceptions.ResponseError as error:
            if not str(error).startswith("WRONGTYPE"):
                raise
            raise Conflict(
                f"dead letter {id} cannot go back: something else than a queue is at {letter.list!r} in Redis; "
                "look at it with TYPE, then remove it with DEL"
            ) from error
        self._scripts.eval("delete", _BASE, id)
        return letter

    def delete(self, id: str) -> None:
        """Forget it. Raises `NotFound`."""
        if not _ID.fullmatch(id) or not self._scripts.eval("delete", _BASE, id):
            raise _not_there(id)


def bury(
    client: redis.Redis, raw: bytes, from_list: str, refused: Refused, *,
    size: int | None = None, held: tuple[str, str, str] = ("", "", ""),
) -> str:  # fmt: skip
    """Drop a message: keep it as a dead letter and answer whoever waits for it; the letter's id.

    `size` is given where `raw` is only the beginning of what has so many bytes. `held` is where a message stands that
    was taken and not acknowledged: the hash, the sorted set, and its tag. It goes from there in the same step. `client`
    may be one that does not decode.
    """
    size = len(raw) if size is None else size
    text, whole = _kept(raw, size)
    answer_key = f"celery-task-meta-{refused.id}" if refused.answered else ""
    made: Any = client.eval(
        _bury(), 1, _BASE, from_list, refused.reason, refused.task or "", refused.id or "", size,
        text, int(whole), MAX_LETTERS, MAX_KEPT_BYTES,
        answer_key, _answer(refused) if answer_key else "", _ANSWER_LIFE_S, *held,
    )  # fmt: skip
    return made.decode() if isinstance(made, bytes) else str(made)


def _kept(raw: bytes, size: int) -> tuple[str, bool]:
    """Return what is kept of a message, and whether that is all of it."""
    if size > MAX_BYTES:
        return raw[:SAMPLE].decode(errors="backslashreplace"), False
    try:
        return raw.decode(), True
    except UnicodeDecodeError:
        return raw[:SAMPLE].decode(errors="backslashreplace"), False


@cache
def _bury() -> str:
    return (resources.files("ferrum") / "lua" / "dead_letters" / "bury.lua").read_text()


def _answer(refused: Refused) -> str:
    """As Celery's result backend keeps what a task returned."""
    return json.dumps(
        {
            "status": "SUCCESS",
            "result": {"error": refused.reason},
            "traceback": None,
            "children": [],
            "date_done": datetime.now(UTC).isoformat(),
            "task_id": refused.id,
        }
    )


def _letter(id_: str, fields: dict[str, str]) -> DeadLetter:
    return DeadLetter(
        id=id_,
        at=int(id_.partition("-")[0]) / 1000,
        queue=fields["list"].partition(_LANE)[0],
        list=fields["list"],
        reason=fields["reason"],
        task=fields["task"] or None,
        task_id=fields["id"] or None,
        size=int(fields["size"]),
        whole=fields["whole"] == "1",
    )


def _not_there(id_: str) -> NotFound:
    return NotFound(f"there is no dead letter {id_!r}: 'ferrum dead-letters list' shows those that are kept")
