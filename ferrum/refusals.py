"""Answers by which Redis refuses: those that pass by themselves, told from those that last.

A connection of ferrum's, be it the record's, the broker's or the result backend's, says a passing refusal as the
connection error that it amounts to. So all that waits for a Redis that is away waits for one that refuses, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

from redis import exceptions

if TYPE_CHECKING:
    from redis.connection import AbstractConnection

#: The first word of an answer, and what an operator reads of it.
_PASSING = {
    "READONLY": "it is a replica, which takes no writes",
    "UNBLOCKED": "it has become a replica",
    "MASTERDOWN": "it is a replica that has lost its master",
    "NOREPLICAS": "too few replicas follow it",
    "MISCONF": "it cannot write to its disk",
    "OOM": "it is full",
    "BUSY": "a script keeps it busy",
    "LOADING": "it is reading its data",
    "CLUSTERDOWN": "its cluster is down",
    "TRYAGAIN": "it is moving keys",
}
#: redis-py takes the word away from these.
_BY_TYPE: dict[type[Exception], str] = {
    exceptions.ReadOnlyError: "READONLY",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.OutOfMemoryError: "OOM",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
}
_ABORTED = "Transaction discarded because of: "


class Refused(exceptions.ConnectionError):
    """Redis answered, and refuses for now: it is a replica, full, busy. Nothing of what was asked is done."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code

    def __str__(self) -> str:
        return f"Redis refuses for now, {_PASSING[self.code]} ({self.code})"

    __repr__ = __str__


def refusal(error: BaseException) -> Refused | None:
    """The passing refusal that an answer of Redis is; `None` for one that lasts, and for what is no answer."""
    if isinstance(error, Refused):
        return error
    code = _code(error)
    return Refused(code) if code in _PASSING else None


def _code(error: BaseException) -> str:
    # By the line of descent: MASTERDOWN is a kind of CLUSTERDOWN to redis-py.
    for kind in type(error).__mro__:
        if kind in _BY_TYPE:
            return _BY_TYPE[kind]
    if not isinstance(error, exceptions.ResponseError):
        return ""
    return str(error).removeprefix(_ABORTED).partition(" ")[0]


def passes(error: BaseException) -> bool:
    """Tell whether the same call may well succeed later: Redis is away, or refuses for now."""
    if locked_out(error):
        return False
    away = (exceptions.ConnectionError, exceptions.TimeoutError)
    return isinstance(error, away) or refusal(error) is not None


def misplaced(error: object) -> bool:
    """Tell whether a key is of another kind than it was asked for as."""
    return isinstance(error, exceptions.ResponseError) and "WRONGTYPE" in str(error)


def locked_out(error: BaseException) -> bool:
    """Tell whether Redis does not let this user in, or not do this: redis-py counts some of it as connection errors."""
    kinds = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)
    return isinstance(error, kinds) or str(error).startswith("DENIED ")


class _Patient:
    """A connection of redis-py that raises `Refused` for a refusal that passes."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)  # type: ignore[misc] # of the class that it is mixed into
        except (exceptions.ResponseError, exceptions.BusyLoadingError) as error:
            self._translate(error)

    def _translate(self, error: exceptions.RedisError) -> NoReturn:
        if refused := refusal(error):
            # Answers to the other commands of a pipeline may be on their way.
            self.disconnect()  # type: ignore[attr-defined]
            raise refused from error
        raise error


def patient(connection_class: type[AbstractConnection]) -> type[AbstractConnection]:
    """A subclass of this class of connections that raises `Refused` for a refusal that passes."""
    if issubclass(connection_class, _Patient):
        return connection_class
    return type(f"Patient{connection_class.__name__}", (_Patient, connection_class), {})


_HURRIED: ContextVar[bool] = ContextVar("ferrum-hurried", default=False)


@contextmanager
def in_a_hurry() -> Iterator[None]:
    """Within, whoever publishes wants to be told soon that Redis is away."""
    token = _HURRIED.set(True)
    try:
        yield
    finally:
        _HURRIED.reset(token)


def hurried() -> bool:
    return _HURRIED.get()
