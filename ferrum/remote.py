"""Remote control of workers: all of it where Redis asks for a password, else what harms nobody.

A step's task is revoked in the run's record, which decides what runs, and in no worker's memory. A rate limit, for
which a worker would keep messages that it took, is refused for steps: they have `rate` and `concurrency`.

Whoever may write to Redis may send a worker Celery's control commands. Where anybody may, a stranger must not be able
to shut down a fleet or to take its queues away.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from celery.worker.control import Panel

from ferrum.settings import redact

log = logging.getLogger(__name__)

#: Of Celery's inspect commands, those that write files or report on the process's memory.
_NO_LOOK = frozenset({"objgraph", "memdump", "memsample"})
#: Of its control commands: a revoke, which is a decision that the record hears, and what Flower and Celery need to
#: show a worker.
_HARMLESS = frozenset({"revoke", "revoke_by_stamped_headers", "enable_events", "heartbeat"})


#: Of its inspect commands, those that tell where the broker is; for a socket, Celery leaves the password in.
_TELLS_SETTINGS: Final = ("conf", "report", "stats")

#: The id of a step's task: its run, and the step.
_STEP: Final = re.compile(r"(run_[0-9A-Z]{26})\.(\S{1,500})")
#: The most characters of whoever revokes.
_LONGEST_NAME: Final = 200

#: Cancels these steps, each a run and a step in it, for this reason.
Revoke = Callable[[Sequence[tuple[str, str]], str], None]


def locked(url: str) -> bool:
    """Whether who uses this URL of a broker has had to name a user or a password."""
    parts = urlsplit(url)
    return "@" in parts.netloc or not {"username", "password", "credential_provider"}.isdisjoint(parse_qs(parts.query))


def handlers(*, locked: bool, revoke: Revoke) -> dict[str, Callable[..., Any]]:
    """Celery's control commands for one worker, by name; all that do harm refuse unless Redis is `locked`."""
    names = {kind.alias: name for name, kind in Panel.meta.items() if kind.alias}
    ours = {"revoke": _revoked(revoke), "terminate": _terminated(revoke), "rate_limit": _rate_limited}
    ours |= {name: _without_secrets(Panel.data[name]) for name in _TELLS_SETTINGS}
    return {
        name: ours.get(name, command) if locked or _open(names.get(name, name)) else _refused(name)
        for name, command in Panel.data.items()
    }


def _revoked(revoke: Revoke) -> Callable[..., Any]:
    def command(state: Any, task_id: str | list[str], terminate: bool = False, by: str = "", **more: Any) -> Any:
        ids = [str(one) for one in (task_id if isinstance(task_id, list) else [task_id])]
        steps = {one: found.groups() for one in ids if (found := _STEP.fullmatch(one))}
        others = [one for one in ids if one not in steps]
        answer = Panel.data["revoke"](state, others, terminate=terminate, **more) if others else None
        if not steps:
            return answer
        who = by[:_LONGEST_NAME] or "remote control"
        revoke([(run, step) for run, step in steps.values()], f"revoked by {who}")
        for one in steps:
            _tell_flower(state, one, terminate)
        said = f"asked the record to cancel {', '.join(steps)}"
        return {"ok": f"{said}; {next(iter(answer.values()))}" if answer else said}

    return command


def _terminated(revoke: Revoke) -> Callable[..., Any]:
    command = _revoked(revoke)
    return lambda state, signal, task_id, **more: command(state, task_id, terminate=True, signal=signal, **more)


def _without_secrets(command: Callable[..., Any]) -> Callable[..., Any]:
    return lambda state, **more: _redacted(command(state, **more))


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {name: "***" if name == "password" and one else _redacted(one) for name, one in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        # Celery has such defaults, and an answer with one is not JSON.
        return str(value)
    return [_redacted(one) for one in value] if isinstance(value, list | tuple) else value


def _tell_flower(state: Any, task_id: str, terminated: bool) -> None:
    events = state.consumer.event_dispatcher
    if events is not None and events.enabled:
        events.send("task-revoked", uuid=task_id, terminated=terminated, signum=None, expired=False)


def _rate_limited(state: Any, task_name: str, rate_limit: str, **more: Any) -> Any:
    if str(task_name).startswith("ferrum."):
        return {
            "error": f"{task_name!r} takes no rate limit: a worker would keep messages for it. Give the steps a 'rate' "
            "or a 'concurrency' in the workflow, which all workers keep"
        }
    return Panel.data["rate_limit"](state, task_name, rate_limit, **more)


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
