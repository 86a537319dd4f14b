"""Remote control of workers: all of it where Redis asks for a password, else what harms nobody.

Whoever may write to Redis may send a worker Celery's control commands. Where anybody may, a stranger must not be able
to shut down a fleet or to take its queues away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

from celery.worker.control import Panel

log = logging.getLogger(__name__)

#: Of Celery's inspect commands, those that write files or report on the process's memory.
_NO_LOOK = frozenset({"objgraph", "memdump", "memsample"})
#: Of its control commands: a revoke, which is a decision that the record hears, and what Flower and Celery need to
#: show a worker.
_HARMLESS = frozenset({"revoke", "revoke_by_stamped_headers", "enable_events", "heartbeat"})


def locked(url: str) -> bool:
    """Whether who uses this URL of a broker has had to name a user or a password."""
    parts = urlsplit(url)
    return "@" in parts.netloc or not {"username", "password", "credential_provider"}.isdisjoint(parse_qs(parts.query))


def handlers(*, locked: bool) -> dict[str, Callable[..., Any]]:
    """Celery's control commands for one worker, by name; all that do harm refuse unless Redis is `locked`."""
    names = {kind.alias: name for name, kind in Panel.meta.items() if kind.alias}
    return {
        name: command if locked or _open(names.get(name, name)) else _refused(name)
        for name, command in Panel.data.items()
    }


def _open(name: str) -> bool:
    return name in _HARMLESS or (Panel.meta[name].type == "inspect" and name not in _NO_LOOK)


def _refused(name: str) -> Callable[..., dict[str, str]]:
    def refuse(_state: Any, **_arguments: object) -> dict[str, str]:
        log.warning("the control command %r was refused: this Redis has no password", name)
        return {
            "error": f"{name!r} is refused, as anybody may write to this Redis: give it a password or an ACL user, and "
            "name them in FERRUM_REDIS_URL; without, there are ping, inspect and revoke"
        }

    return refuse
