"""A run in this process: no broker, no worker, no Redis. The semantics are those of a fleet.

    result = await execute(Plan.of(workflow), {"topic": "tides"}, actors=actors, policy=policy, artifacts=artifacts)

Whatever decides, decides here as well: each act is decided by the policy before it is done, the budget is reserved, and
what happens are the same events. What a fleet adds is missing: it does not outlive the process, nothing is shared with
other processes, and priorities mean nothing.
"""

from __future__ import annotations

import random as chance
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

from pydantic import JsonValue

from ferrum.artifacts import Artifacts
from ferrum.events import Event, fold
from ferrum.executor import Actors
from ferrum.governance.policy import Policy
from ferrum.inline.run import Run
from ferrum.inline.script import Behaviour, Said, Script, Scripted, Sent, Signal, check_steps
from ferrum.inline.shared import Shared
from ferrum.inline.world import Ask, Clock, Person, Stuck, WallClock, World
from ferrum.plan import Plan
from ferrum.results import RunStatus, StepResult, Usage

__all__ = [
    "Ask",
    "Behaviour",
    "Clock",
    "Person",
    "Result",
    "Scripted",
    "Sent",
    "Shared",
    "Signal",
    "Stuck",
    "WallClock",
    "check_steps",
    "execute",
]

#: Steps of blocking code that run at the same time.
_THREADS = 64


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to."""

    run_id: str
    status: RunStatus
    outputs: JsonValue
    #: Why it did not complete; empty where it did.
    reason: str
    usage: Usage
    events: tuple[Event, ...]
    #: Each step that was begun, with its output.
    steps: Mapping[str, StepResult]
    #: The runs inside of it, by the step that started each; of several tries the last.
    inside: Mapping[str, Result] = field(default_factory=dict)


async def execute(
    plan: Plan, input: Mapping[str, JsonValue] | None = None, *, actors: Actors, policy: Policy, artifacts: Artifacts,
    steps: Mapping[str, Behaviour] | None = None, signals: Mapping[str, Signal] | None = None,
    approve: Person | None = None, workflows: Mapping[str, Mapping[str, JsonValue]] | None = None,
    clock: Clock | None = None, shared: Shared | None = None, threads: Executor | None = None,
    random: Callable[[], float] = chance.random, tell: Callable[[Event], None] | None = None,
    own: Collection[str] = (),
) -> Result:  # fmt: skip
    """Run a plan on this event loop to its end, whatever that is: a run that fails is a `Result`, too.

    `steps` says what steps do instead of what they would (see `Scripted`). `signals` are given to the run; `approve` is
    asked where a person would be. `workflows` are those that are registered, by name. `shared` makes several runs share
    a cache, limits and circuit breakers. Blocking steps run in `threads`; `tell` is told of each event as it happens.
    `own` are tasks and functions that the caller hands over, `task:<name>`: its own code, which nobody decides on.

    Raises `InputError`, and `Stuck` when it waits for what will not come. Cancelling it stops all that goes on.
    """
    script = Script(steps)
    script.check(plan)
    pool = threads or ThreadPoolExecutor(_THREADS, "ferrum-inline")
    world = World(
        actors=actors, policy=policy, artifacts=artifacts, approve=approve, clock=clock or WallClock(),
        shared=shared or Shared(), workflows=workflows or {}, threads=pool, random=random,
        tell=tell or (lambda _: None), own=own,
    )  # fmt: skip
    try:
        run = await world.run(plan, input or {}, Said(script, signals or {}))
    finally:
        if threads is None:
            # What was interrupted may still be on its way out.
            pool.shutdown(wait=False, cancel_futures=True)
    return _result(world, run)


def _result(world: World, run: Run) -> Result:
    state = fold(run.events)
    results = {
        step_id: step.model_copy(update={"output": world.opened(state.step_outputs.get(step_id, ""))})
        for step_id, step in state.steps.items()
    }
    return Result(
        run_id=run.run_id,
        status=state.status,
        outputs=world.opened(run.outputs),
        reason=run.reason,
        usage=state.usage,
        events=tuple(run.events),
        steps=results,
        inside={other.up[1]: _result(world, other) for other in world.runs.values() if other.up and other.up[0] is run},
    )
