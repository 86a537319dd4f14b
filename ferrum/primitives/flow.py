"""The values that are built: steps, and what puts them together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pydantic import JsonValue

from ferrum.workflow import COMMON, Workflow

if TYPE_CHECKING:
    from ferrum.inline import Result

#: What stands for a step: a flow, a function, or a Celery task of the user's own.
Steplike: TypeAlias = "Flow | Callable[..., Any]"


class Flowing:
    """What flows in, where a value would stand."""

    def __repr__(self) -> str:
        return "…"


FLOWING: Final = Flowing()


def template(expression: str) -> str:
    """A value that is this expression."""
    return f"{{{{ {expression} }}}}"


def yes_or_no(condition: str) -> str:
    """What a switch looks at that goes by a condition."""
    return template(f'{condition} ? "then" : "otherwise"')


class Flow:
    """Steps put together. A value: every operator and method makes another."""

    def __rshift__(self, other: Steplike) -> Flow:
        return Sequential(self, other)

    def __rrshift__(self, other: Steplike) -> Flow:
        return Sequential(other, self)

    def __or__(self, other: Steplike) -> Flow:
        return Parallel(self, other)

    def __ror__(self, other: Steplike) -> Flow:
        return Parallel(other, self)

    def named(self, name: str) -> Flow:
        """The same as one step of this name; for a whole flow it is the workflow's name."""
        return replace(self.as_one(), name=name)

    def with_(self, **keys: Any) -> Flow:
        """The same as one step that says this, too, instead of what it said: `retry={"max_attempts": 3}`, `when="…"`.

        The keys are those of a workflow file: what any step may have, and the parameters of the step's type. A key
        that is a word of Python has an underscore behind it, `as_`. `fallback` takes flows, `compensate` a flow.
        """
        return self.as_one().saying(keys)

    def workflow(
        self,
        name: str | None = None,
        *,
        inputs: Mapping[str, object] | None = None,
        version: str | None = None,
        budget: Mapping[str, object] | None = None,
        **more: object,
    ) -> Workflow:
        """The workflow that this is; `more` is whatever else a file may say at its top.

        The inputs are the parameters of the first functions, with types by their annotations; `inputs` wins over them,
        name by name. Its outputs are those of its last steps, by name. Raises `WorkflowError` with everything that is
        wrong, also for a function that no worker could import.
        """
        from ferrum.primitives.build import Builder

        given = {"version": version, "budget": budget, **more}
        said = {key: value for key, value in given.items() if value is not None}
        return Builder(inputs or {}).workflow(self, name, said)

    def __workflow__(self) -> Workflow:
        return self.workflow()

    async def execute(self, input: Mapping[str, JsonValue] | None = None, **options: Any) -> Result:
        """Run it here and now, without Redis, broker or worker; for tests and notebooks.

        Functions need no module that they could be imported from: lambdas and functions inside of others do, too. A
        parameter without an annotation has the type of what it is given. The policy, the models and the tools are those
        of this environment; `options` are those of `ferrum.inline.execute`, which may replace them.
        """
        from ferrum.primitives.inline import execute

        return await execute(self, input or {}, **options)

    def as_one(self) -> OneStep:
        """This as one step."""
        return OneStep("block", body=self)


@dataclass(frozen=True, init=False)
class Sequential(Flow):
    """One after the other: what `>>` makes."""

    flows: tuple[Flow, ...]

    def __init__(self, *flows: Steplike) -> None:
        object.__setattr__(self, "flows", _several(Sequential, flows))


@dataclass(frozen=True, init=False)
class Parallel(Flow):
    """Side by side: what `|` makes. Each is called with what flows in."""

    flows: tuple[Flow, ...]

    def __init__(self, *flows: Steplike) -> None:
        object.__setattr__(self, "flows", _several(Parallel, flows))


def _several(kind: type[Sequential | Parallel], flows: Sequence[Steplike]) -> tuple[Flow, ...]:
    """These, with those of the same kind taken apart, so that `(a >> b) >> c` is the same value as `a >> (b >> c)`."""
    if not flows:
        raise TypeError(f"{kind.__name__} is of at least one step")
    parts: list[Flow] = []
    for flow in map(lift, flows):
        parts += flow.flows if isinstance(flow, kind) else [flow]
    return tuple(parts)


@dataclass(frozen=True)
class OneStep(Flow):
    """One step: a leaf, or what stands around others."""

    kind: str
    name: str | None = None
    #: What its type makes sense of.
    params: Mapping[str, Any] = field(default_factory=dict)
    #: What any step may say.
    keys: Mapping[str, Any] = field(default_factory=dict)
    #: What a `task` step calls.
    function: Callable[..., Any] | None = None
    #: Arguments of it that are fixed.
    bound: Mapping[str, JsonValue] = field(default_factory=dict)
    #: What is inside: of a block,
    body: Flow | None = None
    #: a switch or a router,
    choices: Mapping[str, Flow] = field(default_factory=dict)
    otherwise: Flow | None = None
    #: and what is asked after each round, where that is no expression.
    until: Flow | None = None
    fallback: tuple[Flow, ...] = ()
    undo: Flow | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function that it is of, as if it were no step."""
        if self.function is None:
            raise TypeError(f"a step of type {self.kind!r} cannot be called: run it with `await flow.execute(input)`")
        return self.function(*args, **kwargs)

    @property
    def __ferrum_function__(self) -> Callable[..., Any] | None:
        """What a worker calls that finds this where it looks for the function."""
        return self.function

    def as_one(self) -> OneStep:
        return self

    def saying(self, keys: Mapping[str, Any]) -> OneStep:
        said = {key.removesuffix("_"): value for key, value in keys.items()}
        fallback = tuple(map(lift, said.pop("fallback", self.fallback)))
        undo = said.pop("compensate", self.undo)
        common = {key: value for key, value in said.items() if key in COMMON}
        params = {key: value for key, value in said.items() if key not in COMMON}
        return replace(
            self,
            keys={**self.keys, **common},
            params={**self.params, **params},
            fallback=fallback,
            undo=None if undo is None else lift(undo),
        )

    @property
    def said(self) -> frozenset[str]:
        """The keys that change how it is run."""
        inner = [*(["fallback"] if self.fallback else []), *(["compensate"] if self.undo else [])]
        return frozenset([*self.keys, *inner])


@dataclass(frozen=True)
class Chosen(Flow):
    """A switch that goes by what a step says."""

    by: Flow
    switch: OneStep
    #: It says yes or no, and no value.
    yes_or_no: bool


def lift(value: Steplike) -> Flow:
    if isinstance(value, Flow):
        return value
    if isinstance(value, partial):
        return _bound(value)
    celery = sys.modules.get("celery")
    if celery is not None and isinstance(value, celery.Task):
        return OneStep("task", params={"task": value.name}, function=value)
    if celery is not None and isinstance(value, celery.Signature):
        raise TypeError("a Celery signature is no step: put the task itself here, or task('its name', {…})")
    if not callable(value):
        raise TypeError(f"{value!r} is no step: put a function, a step or a flow here")
    return OneStep("task", function=value)


def _bound(value: partial[Any]) -> Flow:
    made = lift(value.func)
    if value.args or not isinstance(made, OneStep) or made.kind != "task":
        raise TypeError(f"{value!r} is no step: fix arguments of a function, and by name")
    return replace(made, bound={**made.bound, **value.keywords})
