"""`type: task`: a Celery task of your own by name, or a function of a module of yours, run inside this step."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from importlib import import_module
from inspect import isawaitable
from types import ModuleType
from typing import Any

from pydantic import Field, JsonValue, TypeAdapter, ValidationError, field_validator, model_validator

from ferrum.errors import StepError, TaskError, did_you_mean
from ferrum.exports import addresses_of, exported_names, function_of, is_address
from ferrum.governance.acts import TaskCall
from ferrum.loop import Interrupted, is_cancelled, is_terminated, raised
from ferrum.settings import settings
from ferrum.steps import Attempt, Params, StepType

_json: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)


class TaskParams(Params):
    task: str | None = Field(None, description="The name that the task is registered under. Either this or `function`.")
    function: str | None = Field(
        None, description="`module:function`, of a module that `FERRUM_IMPORTS` names on the workers, or inside one."
    )
    input: dict[str, Any] | list[Any] = Field({}, description="Its arguments, by name or as a list.")

    @field_validator("task")
    @classmethod
    def _is_the_users(cls, name: str | None) -> str | None:
        if name is not None and name.startswith(("celery.", "ferrum.")):
            raise ValueError(f"{name!r} belongs to the platform; a task step runs a task of your own")
        return name

    @field_validator("function")
    @classmethod
    def _is_an_address(cls, name: str | None) -> str | None:
        if name is not None and not is_address(name):
            raise ValueError(
                f"{name!r} is no function: write module:function, as in shop.steps:fetch, of names without '_' in front"
            )
        return name

    @model_validator(mode="after")
    def _one_of_them(self) -> TaskParams:
        if (self.task is None) == (self.function is None):
            raise ValueError("give either a 'task' or a 'function'")
        return self


class Task(StepType[TaskParams]):
    name = "task"
    params = TaskParams
    foreign = True

    def act(self, params: TaskParams) -> TaskCall:
        return TaskCall(
            name=params.task or params.function or "",
            arguments=params.input,
            known_as=() if params.function is None else _names(params.function),
        )

    def run(self, params: TaskParams, attempt: Attempt) -> Any:
        name = params.task or params.function or ""
        work = _task(name) if params.task is not None else _function(name)
        try:
            result = work(*params.input) if isinstance(params.input, list) else work(**params.input)
        except (StepError, Interrupted):
            raise
        except BaseException as error:
            if is_terminated(error):
                raise
            raised(name, error)
            return None
        return _awaited(name, result) if isawaitable(result) else _checked(name, result)


def _task(name: str) -> Callable[..., object]:
    """The registered task of this name. Raises `StepError`."""
    from celery import current_app

    known = current_app.tasks
    if name not in known:
        yours = [one for one in known if not one.startswith(("celery.", "ferrum."))]
        hint = did_you_mean(name, yours)
        raise StepError(f"no task {name!r} is registered in this worker{hint}; name its module in FERRUM_IMPORTS")
    task: Callable[..., object] = known[name]
    return task


def _function(name: str) -> Callable[..., object]:
    """The function at this address. Raises `StepError`.

    A workflow may come from anywhere, so it reaches nothing but what the modules export that whoever runs the worker
    named, and what is defined in these: not `os:system`, and not an `os` that one of those modules imported.
    """
    module, _, path = name.partition(":")
    if not _is_named(module):
        raise StepError(
            f"this worker does not run {name!r}: it runs the functions of the modules in FERRUM_IMPORTS"
            f" ({settings().imports or 'none'}); name {module!r} there"
        )
    try:
        found: Any = import_module(module)
    except ImportError as error:
        raise StepError(f"this worker cannot import {module!r}: {error}") from error
    known = [one for one in exported_names(found) if function_of(getattr(found, one, None))]
    work = function_of(getattr(found, path, None))
    if work is None:
        hint = did_you_mean(path, known)
        raise StepError(
            f"there is no function {path!r} in {module!r}{hint}; a Celery task goes by its name, under 'task'"
        )
    if path not in known:
        raise StepError(
            f"this worker does not run {name!r}: {module!r} does not export {path!r}; it exports what is in its"
            " __all__, or without one the public functions that it defines"
        )
    if not _is_named(work.__module__):
        raise StepError(
            f"this worker does not run {name!r}: it is defined in {work.__module__!r}, which FERRUM_IMPORTS"
            " does not name"
        )
    return work


def _names(name: str) -> tuple[str, ...]:
    """All names of the function at this address, for a policy may speak of any; none where there is no such one."""
    try:
        function = _function(name)
    except StepError:
        return ()
    ours = [module for one, module in [*sys.modules.items()] if isinstance(module, ModuleType) and _is_named(one)]
    return tuple(addresses_of(function, ours))


def _is_named(module: str) -> bool:
    """Whether it is one of the modules in `FERRUM_IMPORTS`, or inside one."""
    named = [name for part in settings().imports.split(",") if (name := part.strip())]
    return any(module == name or module.startswith(f"{name}.") for name in named)


async def _awaited(name: str, work: Awaitable[object]) -> JsonValue:
    try:
        result = await work
    except (StepError, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, asyncio.CancelledError) and is_cancelled():
            raise
        raised(name, error)
        return None
    return _checked(name, result)


def _checked(name: str, result: object) -> JsonValue:
    try:
        return _json.validate_python(result)
    except ValidationError:
        raise TaskError(f"{name} returned {type(result).__name__}, which is not JSON") from None
