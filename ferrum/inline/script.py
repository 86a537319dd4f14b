"""What a step does instead of what it would do: a value, a failure, a function, with a delay, one for each try."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import JsonValue, TypeAdapter, ValidationError

from ferrum.errors import InputError, StepError, TaskError, did_you_mean
from ferrum.loop import Interrupted, is_cancelled, raised
from ferrum.plan import Plan, template_id

_json: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)


@dataclass(frozen=True, slots=True)
class Scripted:
    """What a step does when it is tried, after a delay."""

    returns: Any = None
    #: An exception, or a class of them.
    raises: BaseException | type[BaseException] | None = None
    delay_s: float = 0.0
    #: What it does in its first try, its second, … and, the last of these, in all that follow; each is whatever may
    #: be written for a step, and has this delay before it.
    times: tuple[Any, ...] | list[Any] = ()


#: A value that is returned, an exception that is raised, a function (plain or `async`) that is given the step's
#: parameters as a `dict`, or a `Scripted`. Of exceptions a `StepError` is taken as it is; any other one may be retried.
Behaviour: TypeAlias = "Scripted | BaseException | type[BaseException] | Callable[[dict[str, Any]], Any] | Any"


@dataclass(frozen=True, slots=True)
class Sent:
    """A signal that a run is given so many seconds after it began."""

    data: JsonValue = None
    after_s: float = 0.0


#: A signal's data, which is there from the start; or a `Sent`; or a tuple, for several of the same name.
Signal: TypeAlias = "JsonValue | Sent | tuple[JsonValue | Sent, ...]"


class Script:
    """What the steps of one run do, by their ids; an id of one item goes before that of all (`each.3`, `each.*`).

    A step of a sub-workflow stands behind the step that runs it: `report/fetch`.
    """

    def __init__(self, steps: Mapping[str, Behaviour] | None = None) -> None:
        self._steps = dict(steps or {})
        self._tries: dict[str, int] = {}

    def check(self, plan: Plan) -> None:
        """Raises `InputError` for the name of a step that this plan does not have."""
        check_steps(plan, self._steps, "steps")

    def of(self, step_id: str) -> Behaviour | None:
        """What this step does; `None` where nothing was said about it, so that `None` itself is `Scripted()`."""
        for name in (step_id, template_id(step_id)):
            if name in self._steps:
                behaviour = self._steps[name]
                return Scripted() if behaviour is None else behaviour
        return None

    def inside(self, step_id: str) -> Script:
        """That of the run which this step starts."""
        return Script(inside(self._steps, step_id))

    async def play(self, step_id: str, params: dict[str, Any]) -> JsonValue:
        """Do what was said for this step's next try."""
        behaviour = self.of(step_id)
        number = self._tries[step_id] = self._tries.get(step_id, 0) + 1
        return _checked(step_id, await _do(behaviour, step_id, number, params))


@dataclass(frozen=True, slots=True)
class Said:
    """All that was said of one run and those inside of it."""

    script: Script = field(default_factory=Script)
    signals: Mapping[str, Signal] = field(default_factory=dict)

    def inside(self, step_id: str) -> Said:
        """That of the run which this step starts."""
        return Said(self.script.inside(step_id), inside(self.signals, step_id))

    @property
    def sent(self) -> Iterator[tuple[str, Sent]]:
        """The signals of this run itself."""
        for name, what in self.signals.items():
            if "/" not in name:
                for one in what if isinstance(what, tuple) else (what,):
                    yield name, one if isinstance(one, Sent) else Sent(one)


def inside(named: Mapping[str, Any], step_id: str) -> dict[str, Any]:
    """Of what is said by step, what is said for the run that this step starts."""
    found: dict[str, Any] = {}
    for start in (f"{template_id(step_id)}/", f"{step_id}/"):
        found |= {name.removeprefix(start): value for name, value in named.items() if name.startswith(start)}
    return found


def check_steps(plan: Plan, names: Iterable[str], what: str) -> None:
    """Raises `InputError` for the name of a step that this plan does not have."""
    for name in names:
        first = name.partition("/")[0]
        if template_id(first) not in plan.steps:
            hint = did_you_mean(first, plan.steps)
            raise InputError(f"{what} names {name!r}, but {plan.workflow.name!r} has no step {first!r}{hint}")


async def _do(behaviour: Behaviour, step_id: str, number: int, params: dict[str, Any]) -> Any:
    if isinstance(behaviour, Scripted):
        if behaviour.delay_s:
            await asyncio.sleep(behaviour.delay_s)
        if behaviour.times:
            return await _do(behaviour.times[min(number, len(behaviour.times)) - 1], step_id, number, params)
        return await _do(behaviour.returns if behaviour.raises is None else behaviour.raises, step_id, number, params)
    if not callable(behaviour) and not isinstance(behaviour, BaseException):
        return behaviour
    try:
        return await _done(behaviour, params)
    except (StepError, Interrupted, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, asyncio.CancelledError) and is_cancelled():
            raise
        # As a Celery task's would be: it may pass.
        raised(step_id, error)
        return None


async def _done(behaviour: Any, params: dict[str, Any]) -> Any:
    if isinstance(behaviour, BaseException):
        raise behaviour
    if isinstance(behaviour, type) and issubclass(behaviour, BaseException):
        raise behaviour
    result = behaviour(params)
    return await result if inspect.isawaitable(result) else result


def _checked(step_id: str, result: object) -> JsonValue:
    try:
        return _json.validate_python(result)
    except ValidationError:
        raise TaskError(f"{step_id} returned {type(result).__name__}, which is not JSON") from None
