"""What is known of the functions that steps call."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final

from pydantic import JsonValue, TypeAdapter, ValidationError

from ferrum.exports import exported_names, function_of, is_address
from ferrum.primitives.flow import OneStep

_json: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)

BY_NAME: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
VARIADIC: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def code(step: OneStep) -> Callable[..., Any]:
    """What a step's function does, for a Celery task what is called by it."""
    assert step.function is not None
    return step.function.run if "task" in step.params else step.function  # type: ignore[attr-defined]


def parameters_of(step: OneStep) -> list[inspect.Parameter] | None:
    """Those of a step's function that are not fixed; `None` where nobody knows."""
    try:
        parameters = inspect.signature(code(step)).parameters.values()
    except (TypeError, ValueError):
        return None
    return [one for one in parameters if one.name not in step.bound]


def has_json_default(parameter: inspect.Parameter) -> bool:
    """Whether it has no default, or one that an input can have."""
    try:
        _json.validate_python(None if parameter.default is parameter.empty else parameter.default)
    except ValidationError:
        return False
    return True


def address_of(function: Callable[..., Any]) -> str | None:
    """Where a worker can import it from, `module:function`; `None` if it cannot."""
    module, path = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not isinstance(function, FunctionType) or not module or module == "__main__":
        return None
    found, address = sys.modules.get(module), f"{module}:{path}"
    if found is None or not is_address(address) or path not in exported_names(found):
        return None
    return address if function_of(getattr(found, path)) is function else None


def shown(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", repr(function))
    match function:
        case FunctionType() if "<lambda>" in name:
            return "a lambda"
        case FunctionType() if "<locals>" in name:
            return f"{name.rpartition('.')[2]!r}, which is defined inside another function"
        case FunctionType() if function.__module__ == "__main__":
            return f"{name!r} from the script that runs"
        case FunctionType():
            return f"{name!r}, which {function.__module__!r} does not export"
    return f"{name!r}, which is no function of a module"
