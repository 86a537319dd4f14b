"""Steps: functions, and those of any other type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, overload

from ferrum.primitives.flow import Flow, OneStep, Steplike, lift


@overload
def step(function: Steplike, /, *, name: str | None = None, input: Any = None, **keys: Any) -> OneStep: ...
@overload
def step(
    function: None = None, /, *, name: str | None = None, input: Any = None, **keys: Any
) -> Callable[[Steplike], OneStep]: ...
def step(
    function: Steplike | None = None, /, *, name: str | None = None, input: Any = None, **keys: Any
) -> OneStep | Callable[[Steplike], OneStep]:
    """A function as a step; also as a decorator. The function may be async; it may still be called as one.

    It is called with what flows in, or with `input` only: its arguments by name, or as a list, with expressions as in
    a workflow file. `functools.partial` fixes some of them by name. `keys` are those of `Flow.with_`. A worker has to
    be able to import the function, from a module that `FERRUM_IMPORTS` names there.
    """
    if function is None:
        return partial(step, name=name, input=input, **keys)
    made = lift(function)
    if not isinstance(made, OneStep) or made.function is None:
        raise TypeError(f"step() makes a step of a function, and {function!r} is a flow already")
    said = keys if input is None else {**keys, "input": input}
    return replace(made, name=name or made.name).saying(said)


def step_of(kind: str, /, *, name: str | None = None, **keys: Any) -> Flow:
    """A step of any type: `step_of("artifact", name_="report.md", content="{{ draft }}")`, `name` is the step's own.

    `keys` are its parameters and what any step may say, as in a workflow file; see `Flow.with_`. It is given what flows
    in by expressions over the names of steps, as there.
    """
    return OneStep(kind, name).saying(keys)


def llm(prompt: str | None = None, *, name: str | None = None, **keys: Any) -> Flow:
    """One answer of a model: `llm("Summarise: {{ fetch }}")`."""
    return step_of("llm", name=name, **({} if prompt is None else {"prompt": prompt}), **keys)


def tool(tool: str, input: Mapping[str, Any] | None = None, *, name: str | None = None, **keys: Any) -> Flow:
    """One call of a tool: `tool("git.log", {"count": 5})`."""
    return step_of("tool", name=name, tool=tool, **({} if input is None else {"input": dict(input)}), **keys)


def task(task: str, input: Any = None, *, name: str | None = None, **keys: Any) -> Flow:
    """A Celery task by the name that it is registered under; it is given `input` only."""
    return step_of("task", name=name, task=task, **({} if input is None else {"input": input}), **keys)


def approval(message: str, *, name: str | None = None, **keys: Any) -> Flow:
    """A person says yes or no."""
    return step_of("approval", name=name, message=message, **keys)


def wait(*, name: str | None = None, **keys: Any) -> Flow:
    """Wait: `wait(for_="1h")`, `wait(until="2026-12-24T18:00:00+01:00")` or `wait(signal="paid")`."""
    return step_of("wait", name=name, **keys)
