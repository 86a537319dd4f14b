"""Remote control of workers: all of it where Redis asks for a password, else what harms nobody.

A step's task is revoked in the run's record, which decides what runs, and in no worker's memory. Whoever revokes
through ferrum's app tells the record by itself, as Celery's broadcast is heard only by workers that are up. A rate
limit, for which a worker would keep messages that it took, is refused for steps: they have `rate` and `concurrency`.

Whoever may write to Redis may send a worker Celery's control commands. Where anybody may, a stranger must not be able
to shut down a fleet or to take its queues away.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn
from urllib.parse import parse_qs, urlsplit

from celery.app import control
from celery.worker.control import Panel

from ferrum.errors import AuthorError, NotFound
from ferrum.messages import is_message_id, is_run_id, step_of
from ferrum.record import Record, Resend
from ferrum.settings import redact

log = logging.getLogger(__name__)

#: Of Celery's inspect commands, those that write files or report on the process's memory.
_NO_LOOK = frozenset({"objgraph", "memdump", "memsample"})
#: Of its control commands: a revoke, which is a decision that the record hears, and what Flower and Celery need to
#: show a worker.
_HARMLESS = frozenset({"revoke", "revoke_by_stamped_headers", "enable_events", "heartbeat"})


#: Of its inspect commands, those that tell where the broker is; for a socket, Celery leaves the password in.
_TELLS_SETTINGS: Final = ("conf", "report", "stats")

#: The most characters of whoever revokes.
_LONGEST_NAME: Final = 200
#: Of an id that is none, so much is shown.
_SHOWN: Final = 60
#: Among the answers to a revoke, the name of the one that is the record's and no worker's.
RECORD: Final = "record@ferrum"
_NO_STAMPS: Final = "no message of ferrum's keeps stamps: revoke by id, 'celery -A ferrum control revoke RUN.STEP'"

#: Has the record hear that the tasks with these ids are revoked, and by whom.
Revoke = Callable[[Sequence[str], str], None]


class Control(control.Control):  # type: ignore[misc] # Celery is untyped
    """Remote control of ferrum's workers; what is revoked is told to the record, too."""

    def broadcast(
        self, command: str, arguments: Mapping[str, Any] | None = None, destination: Any = None, *, reply: bool = False,
        callback: Any = None, **more: Any,
    ) -> Any:  # fmt: skip
        """Celery's; with `reply`, the record's answer to a revoke comes first, under the name `record@ferrum`."""
        mine = self._of_record(command, {**(arguments or {}), **more})
        if mine and reply and callback is not None:
            callback(mine)
        answers = super().broadcast(command, arguments, destination, reply=reply, callback=callback, **more)
        return [mine, *(answers or [])] if mine and reply else answers

    def revoke_by_stamped_headers(self, *_: object, **__: object) -> NoReturn:
        """Raises `NotFound`: there is nothing that it could find."""
        raise NotFound(_NO_STAMPS)

    def _of_record(self, command: str, arguments: Mapping[str, Any]) -> dict[str, dict[str, str]] | None:
        if command == "revoke_by_stamped_headers":
            return {RECORD: {"error": _NO_STAMPS}}
        # A terminate by its own name is refused by workers where anybody may write to Redis.
        if command != "revoke" and not (command == "terminate" and locked(str(self.app.conf.broker_write_url))):
            return None
        ids = _ids(arguments.get("task_id"))
        return {RECORD: self.app.revoke(ids, str(arguments.get("by") or ""))} if ids else None


def revoke(
    record: Record, publish: Callable[[Sequence[Resend]], None], task_ids: Iterable[str], by: str
) -> dict[str, str]:  # fmt: skip
    """Tell the record that these tasks are revoked; `publish` sends what goes on because of it.

    Returns Celery's kind of answer, with a sentence for each id: `ok`, or `error` where nothing was revoked.
    """
    who = by[:_LONGEST_NAME] or "remote control"
    messages, done, said = [], False, []
    for id_ in task_ids:
        if step := step_of(id_):
            try:
                publish(record.revoke(*step, f"revoked by {who}"))
            except AuthorError as error:
                # Of all that hear of it one is the first.
                log.debug("%s", error)
                said.append(str(error))
            else:
                log.info("%s is cancelled: revoked by %s", id_, who)
                done = True
                said.append(f"{id_} is cancelled")
        elif is_run_id(id_):
            said.append(f"{id_} is a run: end it with 'ferrum runs cancel {id_}'")
        elif is_message_id(id_):
            messages.append(id_)
            said.append(f"{id_} is dropped if no worker has taken it yet")
        else:
            said.append(f"{id_[:_SHOWN]!r} is no id of a task")
    if messages:
        record.revoke_messages(messages)
    return {"ok" if done or messages else "error": "; ".join(said)}


def _ids(given: Any) -> list[str]:
    if given is None:
        return []
    return list(dict.fromkeys(map(str, given if isinstance(given, list | tuple | set | frozenset) else [given])))


def locked(url: str) -> bool:
    """Tell whether this URL of a broker names a user or a password."""
    parts = urlsplit(url)
    return "@" in parts.netloc or not {"username", "password", "credential_provider"}.isdisjoint(parse_qs(parts.query))


def handlers(*, locked: bool, revoke: Revoke) -> dict[str, Callable[..., Any]]:
    """Celery's control commands for one worker, by name; all that do harm refuse unless Redis is `locked`."""
    names = {kind.alias: name for name, kind in Panel.meta.items() if kind.alias}
    ours: dict[str, Callable[..., Any]] = {
        "revoke": _revoked(revoke), "terminate": _terminated(revoke), "revoke_by_stamped_headers": _stamped,
        "rate_limit": _rate_limited,
    }  # fmt: skip
    ours |= {name: _without_secrets(Panel.data[name]) for name in _TELLS_SETTINGS}
    return {
        name: ours.get(name, command) if locked or _open(names.get(name, name)) else _refused(name)
        for name, command in Panel.data.items()
    }


def _revoked(revoke: Revoke) -> Callable[..., Any]:
    def command(state: Any, task_id: str | list[str], terminate: bool = False, by: str = "", **more: Any) -> Any:
        ids = _ids(task_id)
        if ids:
            revoke(ids, str(by))
        steps = [one for one in ids if step_of(one)]
        others = [one for one in ids if not step_of(one)]
        answer = Panel.data["revoke"](state, others, terminate=terminate, **more) if others else None
        for one in steps:
            _tell_flower(state, one, terminate)
        if not steps:
            return answer
        said = f"asked the record to cancel {', '.join(steps)}"
        return {"ok": f"{said}; {next(iter(answer.values()))}" if answer else said}

    return command


def _stamped(_state: Any, **_arguments: object) -> dict[str, str]:
    return {"error": _NO_STAMPS}


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
