"""`type: task`: a Celery task of your own, by name, run inside this step."""

from __future__ import annotations

from collections.abc import Awaitable
from inspect import isawaitable
from typing import Any

from pydantic import Field, JsonValue, TypeAdapter, ValidationError, field_validator

from ferrum.errors import StepError, TaskError, did_you_mean
from ferrum.steps import Attempt, Params, StepType

_json: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)


class TaskParams(Params):
    task: str = Field(description="The name that the task is registered under.")
    input: dict[str, Any] = Field({}, description="Its keyword arguments.")

    @field_validator("task")
    @classmethod
    def _is_the_users(cls, name: str) -> str:
        if name.startswith(("celery.", "ferrum.")):
            raise ValueError(f"{name!r} belongs to the platform; a task step runs a task of your own")
        return name


class Task(StepType[TaskParams]):
    name = "task"
    params = TaskParams

    def run(self, params: TaskParams, attempt: Attempt) -> Any:
        from celery import current_app

        known = current_app.tasks
        if params.task not in known:
            yours = [name for name in known if not name.startswith(("celery.", "ferrum."))]
            hint = did_you_mean(params.task, yours)
            raise StepError(
                f"no task {params.task!r} is registered in this worker{hint}; name its module in FERRUM_IMPORTS"
            )
        try:
            result = known[params.task](**params.input)
        except StepError:
            raise
        except Exception as error:
            raise _raised(params.task, error) from error
        return _awaited(params.task, result) if isawaitable(result) else _checked(params.task, result)


async def _awaited(name: str, work: Awaitable[object]) -> JsonValue:
    try:
        result = await work
    except StepError:
        raise
    except Exception as error:
        raise _raised(name, error) from error
    return _checked(name, result)


def _raised(name: str, error: Exception) -> TaskError:
    return TaskError(f"{name} raised {type(error).__name__}: {error}", retry=True)


def _checked(name: str, result: object) -> JsonValue:
    try:
        return _json.validate_python(result)
    except ValidationError:
        raise TaskError(f"{name} returned {type(result).__name__}, which is not JSON") from None
