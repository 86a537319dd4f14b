"""A flow that is run in this process."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pydantic import JsonValue

from ferrum.actors import LiveActors
from ferrum.artifacts import Artifacts
from ferrum.governance.policy import load_policy
from ferrum.inline import Result
from ferrum.inline import execute as execute_plan
from ferrum.plan import Plan
from ferrum.primitives.build import Builder
from ferrum.primitives.flow import Flow
from ferrum.settings import settings


async def execute(flow: Flow, input: Mapping[str, JsonValue], **options: Any) -> Result:
    """See `Flow.execute`."""
    builder = Builder({}, here=True, sample=input)
    plan = Plan(builder.workflow(flow, None, {}))
    named = {
        id: str(step.spec.params.get("function") or step.spec.params.get("task"))
        for id, step in plan.steps.items()
        if step.type.name == "task"
    }
    steps = {id: _calling(builder.functions[name]) for id, name in named.items() if name in builder.functions}
    config = settings()
    actors = LiveActors(config)
    try:
        return await execute_plan(
            plan,
            input,
            **{
                "actors": actors,
                "policy": load_policy(config),
                "artifacts": Artifacts.of(config),
                **options,
                "steps": {**steps, **options.get("steps", {})},
            },
        )
    finally:
        await actors.aclose()


def _calling(function: Callable[..., Any]) -> Callable[[dict[str, Any]], Awaitable[Any]]:
    """What is called with the parameters of the step."""

    async def call(params: dict[str, Any]) -> Any:
        given = params["input"]
        args, named = (given, {}) if isinstance(given, list) else ((), given)
        if inspect.iscoroutinefunction(function):
            return await function(*args, **named)
        # As in a worker, one that blocks holds up none of those beside it.
        result = await asyncio.to_thread(function, *args, **named)
        return await result if inspect.isawaitable(result) else result

    return call
