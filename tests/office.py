"""An executor, the runs that it works on, and what Celery and the sweeper would do for it; no worker, no broker."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from by_hand import ByHand
from pydantic import JsonValue

from ferrum.artifacts import Artifacts, Kept
from ferrum.events import RunState
from ferrum.executor import Executor, Outcome, Then
from ferrum.governance.budget import Limits
from ferrum.governance.policy import Policy
from ferrum.loop import LoopThread
from ferrum.plan import Plan, template_id
from ferrum.record import LANES, Claimed, Held, Record, Resend, base_of, new_run_id
from ferrum.steps import Attempt, Params, StepType, step_types
from ferrum.testing.actors import ScriptedActors
from ferrum.workflow import Workflow


class Given(Params):
    value: JsonValue = None


Act = Callable[[Given, Attempt], Any]


def step_type(name: str, run: Act, *, waits: bool = False) -> StepType[Any]:
    """A step type that does this, with whatever `value` it is given."""
    kind = type(name, (StepType,), {"name": name, "params": Given, "run": staticmethod(run), "waits": waits})
    return kind()  # type: ignore[no-any-return]


class Deaf(Record):
    """Does not hear the first answer to whatever it asks for, and asks again."""

    def _eval(self, name: str, base: str, *arguments: str | int) -> list[Any]:
        super()._eval(name, base, *arguments)
        return super()._eval(name, base, *arguments)


class Office:
    """One worker's executor, and the runs that it works on.

    A step of type `act` gives its `value`, or does what `says` has for its id.
    """

    def __init__(
        self, record: Record, loop: LoopThread, artifacts: Artifacts, *, mute: bool = False, deadly: bool = False
    ) -> None:
        """`mute`: whatever is sent is lost, so that the sweeper has to find it.

        `deadly`: a worker dies as soon as it has claimed a step, and the next one when it has finished it.
        """
        self.mute = mute or deadly
        self.deadly = deadly
        self._died: set[tuple[str, str, int]] = set()
        self.actors = ScriptedActors()
        self.says: dict[str, JsonValue | Exception | Act] = {}
        #: What `act` steps did, in the order in which they began.
        self.did: list[str] = []
        self.executor = Executor(
            record=record,
            artifacts=artifacts,
            policy=Policy.of({"allow": ["tool:*", "model:*", "sandbox:*", "task:*"]}),
            actors=self.actors,
            loop=loop,
            worker="w",
            lease_s=60,
        )

    @property
    def record(self) -> Record:
        return self.executor.record

    def act(self, params: Given, attempt: Attempt) -> Any:
        self.did.append(attempt.step_id)
        said = self.says.get(attempt.step_id, params.value)
        if isinstance(said, Exception):
            raise said
        return said(params, attempt) if callable(said) else said

    # One attempt at a time.

    def begin(
        self, steps: Mapping[str, object], given: JsonValue = None, limits: Limits | None = None, **more: object
    ) -> ByHand:
        inputs = {name: {"type": "string"} for name in given} if isinstance(given, dict) else {}
        workflow = Workflow.of({"name": "x", "inputs": inputs, "steps": steps, **more})
        return ByHand(self.record, workflow, input=json.dumps({"v": given or {}}), limits=limits)

    def attempt(self, run: ByHand | str, step: str = "a") -> Outcome:
        run_id = run if isinstance(run, str) else run.run_id
        return self.executor.attempt(run_id, step, lambda: f"signature of {step}")

    def play(self, steps: Mapping[str, object], given: JsonValue = None, **more: Any) -> RunState:
        """One attempt at each step, in order."""
        run = self.begin(steps, given, **more)
        for step in run.plan.steps:
            self.attempt(run, step)
        return self.record.state(run.run_id)

    # All that follows.

    def submit(self, steps: Mapping[str, object], *, tenant: str | None = None, **more: object) -> str:
        """Begin a run, of which nothing was attempted yet."""
        plan = Plan.of({"name": "x", "steps": steps, **more})
        return self.record.create(plan.new_run(new_run_id(), None, '{"v":{}}', tenant=tenant)).run_id

    def run(self, steps: Mapping[str, object], **more: object) -> str:
        """Begin a run and go on until nothing more happens by itself."""
        run_id = self.submit(steps, **more)
        self.go_on(self.heads(run_id))
        return run_id

    def heads(self, run_id: str) -> list[Resend]:
        """What is sent first."""
        plan = self.executor.plan_of(run_id)
        firsts = {plan.segment_of[step.id].id: step.id for step in reversed(plan.roots)}
        return [Resend(run_id, step, "head") for step in reversed(list(firsts.values()))]

    def go_on(self, sends: Iterable[Resend]) -> None:
        """Attempt what is sent, what its canvas goes on to, and what follows from that, until nothing is left."""
        queue = deque(sends)
        while queue or (queue := deque(self.sweep())):
            what = queue.popleft()
            for step in self._first_of(what):
                followed = list(self._followed(what.run_id, step))
                queue.extend([] if self.mute else followed)

    def _first_of(self, what: Resend) -> list[str]:
        if what.signature != "head":
            return [what.step_id]
        segment, prefix = self.executor.plan_of(what.run_id).starting_with(what.step_id)
        return [prefix + head for head in segment.heads]

    def _dies(self, run_id: str, step: str) -> bool:
        """Whether the worker that takes it dies with it, which is so for the first of each turn that it has."""
        turn = (run_id, step, self.did.count(step))
        if not self.deadly or turn in self._died:
            return False
        self._died.add(turn)
        return isinstance(self.record.claim(Held(run_id, step, f"dead#{len(self._died)}"), "dead", 0), Claimed)

    def _lose(self, held: Held) -> None:
        """Its worker is dead, and nobody renews its lease."""
        self.executor.holds.drop(held)
        name = f"{held.run_id} {held.step_id} {held.token}"
        self.record._redis.zadd(f"{base_of(held.run_id)}:leases", {name: 0}, xx=True)

    def _followed(self, run_id: str, step: str) -> Iterator[Resend]:
        if self._dies(run_id, step):
            return
        outcome = self.attempt(run_id, step)
        yield from outcome.sends
        if outcome.held is not None:
            if self.deadly:
                self._lose(outcome.held)
                return
            self.executor.holds.release(outcome.held)
            self.record.release(self.executor.holds.take_released())
        if outcome.then is Then.PASS:
            node = json.loads(self.executor.plan_of(run_id).nodes()[template_id(step)])
            prefix = step[: step.rfind(".") + 1]
            yield from (Resend(run_id, prefix + edge[0], "") for edge in node["x"] if edge[2])

    def sweep(self) -> tuple[Resend, ...]:
        """What the sweeper finds; what is ready is lost only where whatever is sent is."""
        lossy = self.mute or isinstance(self.record, Deaf)
        kinds = {kind.queue for kind in [*step_types().values(), self._type]}
        queues = {(queue, lane): True for queue in kinds for lane in range(LANES)}
        # Of a kind it repairs so many at a time, and what was sent for one of them may be nothing.
        for _ in range(5 if lossy else 1):
            if sends := self.record.sweep(queues, resend_after_s=0 if lossy else 60, reap=True).sends:
                return sends
        return self.executor.share()

    @property
    def _type(self) -> StepType[Any]:
        return step_type("act", self.act)

    def time_comes(self, run_id: str, what: str) -> None:
        """It is as late as this timer of the run waits for: a step's, its deadline's (`<step>!d`), or `!deadline`."""
        timers = f"{base_of(run_id)}:timers"
        assert self.record._redis.zadd(timers, {f"{run_id} {what}": 0}, xx=True, ch=True) == 1, f"no timer {what}"
        self.go_on(self.sweep())

    # What came of it.

    def state(self, run_id: str) -> RunState:
        return self.record.state(run_id)

    def said(self, run_id: str) -> tuple[str, str | None]:
        """How the run ended, and why."""
        state = self.state(run_id)
        return state.status.value, state.reason

    def output(self, run_id: str, step: str) -> JsonValue:
        return self.executor.artifacts.resolve(Kept.loads(self.state(run_id).step_outputs[step]))

    def statuses(self, run_id: str) -> dict[str, str]:
        """Of each step that something happened to."""
        return {step: result.status.value for step, result in self.state(run_id).steps.items()}

    def left_behind(self, run_id: str) -> list[str]:
        """What Redis still holds of an ended run that nobody will ever ask for; and counters that are not even."""
        client, base = self.record._redis, base_of(run_id)
        found = [key for key in ("open", "parked", "undo", "inner", "late") if client.exists(f"{base}:{key}:{run_id}")]
        for key in client.scan_iter(f"{base}:*", count=1000):
            if client.type(key) == "zset" and not key.endswith(":runs"):
                found += [f"{key} {name}" for name in client.zrange(key, 0, -1) if run_id in name]
        counters = client.hmget(f"{base}:run:{run_id}", "active", "asking", "left")
        return found + ([] if counters == ["0", "0", "0"] else [f"active, asking, left: {counters}"])
