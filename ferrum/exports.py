"""Functions that a module has for others: what a workflow, which may come from anybody, may name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any, Final

#: How deep a name may be wrapped as a step.
_LAYERS: Final = 8


def is_address(name: str) -> bool:
    """Tell whether it is `module:function`, of names that are for others: none begins with `_` or has parts."""
    module, _, function = name.partition(":")
    return all(part.isidentifier() and not part.startswith("_") for part in (*module.split("."), function))


def exported_names(module: ModuleType) -> list[str]:
    """The names in its `__all__`; without one, its public names of functions that it defines itself."""
    said = getattr(module, "__all__", None)
    if said is not None:
        return [str(name) for name in said]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (found := function_of(value)) and found.__module__ == module.__name__
    ]


def function_of(value: object) -> Callable[..., Any] | None:
    """The function that this is, or that `ferrum.primitives.step` made it of; `None` for all else."""
    found: Any = value
    for _ in range(_LAYERS):
        if isinstance(found, FunctionType):
            return found
        # Of its class: an object that answers to any name is no step.
        if not hasattr(type(found), "__ferrum_function__"):
            return None
        found = found.__ferrum_function__
    return None


def addresses_of(function: Callable[..., Any], modules: Iterable[ModuleType]) -> list[str]:
    """All names by which these modules export a function, and the one that it was defined under."""
    found = [
        f"{module.__name__}:{name}"
        for module in modules
        for name in exported_names(module)
        if function_of(getattr(module, name, None)) is function
    ]
    return list(dict.fromkeys([f"{function.__module__}:{function.__name__}", *found]))
