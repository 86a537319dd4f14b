"""One attempt at one step on an event loop: what `ferrum.executor` does in a worker, with the same outcome."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from ferrum.cache import digest_of
from ferrum.errors import (
    LONGEST_ERROR,
    AuthorError,
    Denied,
    SettingsError,
    StepError,
    StepTimeout,
    Unavailable,
    bug,
)
from ferrum.governance.acts import Act, By, R
from ferrum.governance.door import decide
from ferrum.governance.policy import Decision, Effect
from ferrum.inline.run import CHILDREN, RUN, Claim, Frames, Lost, Run, State, body_of, reads
from ferrum.limits import Concurrency, Rate
from ferrum.loop import Blocking, Interrupted, contained, contained_on_loop
from ferrum.plan import PARAMS, Body, PlannedStep
from ferrum.record import MAX_DEPTH, Verdict
from ferrum.results import RunStatus, StepStatus, Usage
from ferrum.settings import redact, settings
from ferrum.steps import Done, Health, Inside, Park, Skip
from ferrum.untrusted import Marks
from ferrum.workflow import Step

if TYPE_CHECKING:
    from ferrum.inline.world import World

log = logging.getLogger(__name__)

_CACHE, _LIMIT = "cache", "limit"


class Attempt:
    """From the claim to what became of it; the `Composed` that step types see."""

    def __init__(self, world: World, claim: Claim) -> None:
        self._world = world
        self._claim = claim
        self._step: PlannedStep = claim.run.plan.step(claim.step_id)
        self._scoped: dict[str, JsonValue] = {}
        self._began = asyncio.get_running_loop().time()
        #: By the acts of this attempt, and the part of it that the run knows already.
        self._usage = Usage()
        self._settled = Usage()
        #: What it computes for all: its digest, and for how long it may be taken again.
        self._computes: tuple[str, float] | None = None

    async def go(self) -> None:
        try:
            await self._go()
        except Lost:
            self._let_go()
        except Exception as error:
            log.exception("%s.%s: what came of it cannot be recorded", self.run_id, self.step_id)
            self._finish(StepStatus.FAILED, {"error": redact(bug(error))[:LONGEST_ERROR]})

    async def _go(self) -> None:  # noqa: PLR0911 - one per way to end
        try:
            self._scoped = self._scope()
            tried = self._alternative()
            if tried is None and self._step.when is not None and not self._step.when.evaluate(self._scoped):
                raise Skip("its 'when' is false")
            if (found := self._look_up()) is not None:
                return self._finish(StepStatus.COMPLETED, {"cached": True}, output=found)
            if tried is not None:
                return self._fell_back(*tried)
            output = await self._act()
            envelope = self._kept(output)
        except Lost:
            raise
        except Park as park:
            return self._park(park)
        except Inside as inside:
            return self._inside(inside)
        except Skip as skip:
            return self._finish(StepStatus.SKIPPED, {"reason": redact(str(skip))})
        except StepError as error:
            return self._failed(error)
        except (AuthorError, SettingsError) as error:
            return self._failed(StepError(str(error)))
        except Unavailable as error:
            away = StepError(str(error), retry=True)
            away.kind = "unavailable"
            return self._failed(away)
        except Exception as error:
            log.exception("%s.%s: a bug in step type %r", self.run_id, self.step_id, self._step.type.name)
            return self._failed(StepError(bug(error)))
        return self._finish(StepStatus.COMPLETED, {}, output=envelope)

    # What step types see.

    @property
    def run_id(self) -> str:
        return self._run.run_id

    @property
    def step_id(self) -> str:
        return self._claim.step_id

    @property
    def number(self) -> int:
        return self._state.attempt

    @property
    def idempotency_key(self) -> str:
        return f"{self.run_id}.{self.step_id}"

    @property
    def timeout_s(self) -> float | None:
        return self._step.timeout_s

    @property
    def verdict(self) -> Verdict | None:
        return self._state.verdict

    @property
    def memory(self) -> JsonValue:
        return self._state.memory

    @property
    def spec(self) -> Step:
        return self._step.spec

    @property
    def address(self) -> str:
        return f"{self._run.plan.workflow.name}.{self._step.id}"

    @property
    def own_label(self) -> str:
        return "" if "" in self._step.bodies else str(self._state.failed_tries + 1)

    def now(self) -> float:
        return self._world.now()

    @property
    def marks(self) -> Marks:
        return self._run.marks

    def signal(self) -> tuple[JsonValue] | None:
        return (self._opened(self._state.signal),) if self._state.signal else None

    def frame(self, label: str) -> Done:
        return self._done(f"{self.step_id}.{label}" if label else self.step_id, body_of(self._step, label))

    def frames(self, count: int) -> Iterator[Done]:
        body = body_of(self._step, None)
        return (self._done(f"{self.step_id}.{number}", body) for number in range(count))

    def until(self, done: Done, label: str) -> bool:
        assert self._step.until is not None
        own = {self._step.spec.id: done.output, "round": int(label), "previous": done.output}
        return bool(self._step.until.evaluate({**self._scoped, **done.outputs, **own}))

    def start_run(
        self, workflow: Mapping[str, JsonValue], input: Mapping[str, JsonValue], budget: Mapping[str, JsonValue] | None
    ) -> str:
        if self._run.depth >= MAX_DEPTH:
            raise StepError(f"workflows are inside of each other more than {MAX_DEPTH} deep")
        document = dict(workflow) if budget is None else {**workflow, "budget": dict(budget)}
        fed = self._run.plan.feeding(self._step, "input", self.marks.fed)
        return self._world.new_run(document, input, (self._run, self.step_id), fed).run_id

    def registered(self, name: str, version: str | None) -> Mapping[str, JsonValue]:
        return self._world.registered(name, version)

    def run_end(self, run_id: str) -> Done:
        run = self._world.runs[run_id]
        if not run.status.ended:
            return Done(over=False)
        if run.status is RunStatus.COMPLETED:
            return Done(over=True, output=self._opened(run.outputs))
        why = f"{run_id} {run.status}" + (f": {run.reason}" if run.reason else "")
        return Done(over=True, error=why, denied=why if run.status is RunStatus.POLICY_BLOCKED else "")

    def health(self, targets: Sequence[str]) -> Mapping[str, Health]:
        return self._world.shared.breaker.health(targets, self._world.now())

    def allowed(self, target: str) -> bool:
        return self._world.shared.breaker.allow(target, self._who, self._world.now())

    def report(self, target: str, *, ok: bool, latency_ms: float) -> None:
        self._world.shared.breaker.report(target, self._who, ok=ok, latency_ms=latency_ms, now=self._world.now())

    async def perform(self, act: Act[R], /) -> R:
        self._decide(act)
        return await self._do(act)

    def _decide(self, act: Act[Any]) -> None:
        """Returns where the act may be done now. Raises `Denied`, and `Park` to ask a person."""
        decision = decide(act, self._world.policy, self._state.grants)
        spent = self._unsettled()
        self._run.admit(
            self._claim, {**decision.model_dump(mode="json"), "attempt": self.number},
            allowed=decision.effect is Effect.ALLOW, wanted=self._world.actors.estimate(act), spent=spent,
        )  # fmt: skip
        self._settled += spent
        if decision.effect is Effect.DENY:
            raise Denied(decision.reason)
        if decision.effect is Effect.ASK:
            raise self._ask(act, decision)

    def _ask(self, act: Act[Any], decision: Decision) -> Denied | Park:
        verdict = self._state.verdict
        if verdict is not None and self._state.bound == act.digest:
            if verdict.expired:
                return Denied(f"nobody decided about {act.target} in time")
            note = f": {verdict.note}" if verdict.note else ""
            return Denied(f"{verdict.by or 'a person'} refused {act.target}{note}")
        shown = act.model_dump(mode="json")
        return Park("ask", f"{act.kind} {act.target}: {decision.reason}", act=shown, bound=act.digest)

    async def _do(self, act: Act[R]) -> R:
        self._usage += act.counts
        reply = await self._world.actors.carry_out(
            act, By(self.idempotency_key, settings().tenant, self._say, self.perform)
        )
        self._usage += reply.usage
        for doubt in reply.doubts:
            self._say("usage", doubt)
        return reply

    def _say(self, stream: str, text: str) -> None:
        self._run.say(self._claim, {"attempt": self.number, "stream": stream, "text": redact(text)})

    # What it needs for that.

    @property
    def _run(self) -> Run:
        return self._claim.run

    @property
    def _state(self) -> State:
        return self._claim.state

    @property
    def _who(self) -> tuple[str, str]:
        return self.run_id, self.step_id

    def _opened(self, envelope: str) -> JsonValue:
        return self._world.opened(envelope)

    def _kept(self, value: JsonValue) -> str:
        return self._world.artifacts.keep(value).dumps()

    def _scope(self) -> dict[str, JsonValue]:
        step = self._step
        parts = self.step_id.split(".")
        numbers = {name: int(parts[count - 1]) for name, count in step.numbers}

        def seen(names: frozenset[str], prefix: str) -> dict[str, JsonValue]:
            return {
                name: numbers[prefix + name] if prefix + name in numbers else self._seen(name, prefix) for name in names
            }

        scope = seen(step.references - {"params"}, "")
        if (undone := step.params_of) is not None:
            scope["params"] = undone.params.evaluate(seen(undone.references, PARAMS))
        return scope

    def _seen(self, name: str, prefix: str) -> JsonValue:
        if name == "input":
            return self._opened(self._run.given)
        name = prefix + name
        for item, count in self._step.items:
            if item == name:
                return self._opened(self._run.items.get(".".join(self.step_id.split(".")[:count]), ""))
        outer = reads(self.step_id, self._step).get(name)
        if outer is None:
            outer = self._run.frame_of(self.step_id)[1] + name
        return self._opened(self._run.steps[outer].output)

    def _own(self, frame: str) -> dict[str, JsonValue]:
        """What is a frame's own."""
        if (own := self._step.own_names) is None:
            return {}
        return {own[0]: self._opened(self._run.items.get(frame, "")), own[1]: int(frame.rpartition(".")[2])}

    def _done(self, frame: str, body: Body) -> Done:
        failing = self._run.failed_in(frame, body)
        over = self._run.is_over(frame, body)
        if failing is not None:
            step_id, state = failing
            where = "" if "" in body.steps else f"{step_id!r} failed: "
            return Done(over, error=where + state.error, denied=state.denied)
        ends = {name: self._run.steps[f"{frame}.{name}" if name else frame] for name in body.steps}
        outputs = {name: self._opened(state.output) for name, state in ends.items()}
        if not over:
            return Done(over=False, outputs=outputs)
        if body.output is not None:
            scope = {**self._scoped, **self._own(frame), **outputs}
            return Done(over=True, output=body.output.evaluate(scope), outputs=outputs)
        last = body.last
        output: JsonValue = outputs[last[0]] if len(last) == 1 else {name: outputs[name] for name in last}
        return Done(over=True, output=output, outputs=outputs)

    # Acting.

    async def _act(self) -> JsonValue:
        params = self._run.plan.resolved(self._step, self._scoped, self.marks)
        self._take_turn()
        script, kind = self._run.said.script, self._step.type
        if script.of(self.step_id) is not None:
            given = params.model_dump(mode="json", by_alias=True)
            return await self._limited(script.play(self.step_id, given))
        if (own := kind.act(params)) is not None and f"{own.kind}:{own.target}" not in self._world.own:
            self._decide(own)
            self._usage += own.counts
        if inspect.iscoroutinefunction(kind.run):
            with self._world.clock.busy():
                return await self._limited(kind.run(params, self))
        if kind.composed or kind.waits:
            # They decide what is next, and wait for nothing.
            decided: Any = kind.run(params, self)
            output: JsonValue = decided
            return output
        result = await self._in_thread(partial(kind.run, params, self))
        if inspect.isawaitable(result):
            with self._world.clock.busy():
                result = await self._limited(result)
        done: JsonValue = result
        return done

    async def _limited(self, work: Awaitable[JsonValue]) -> JsonValue:
        try:
            async with asyncio.timeout(self._step.cut_off_s) as limit:
                return await contained_on_loop(work)
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._too_long() from None

    def _too_long(self) -> StepTimeout:
        return StepTimeout(f"took longer than its timeout of {self._step.timeout_s:g} s", retry=True)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        loop, blocking = asyncio.get_running_loop(), Blocking()

        def run() -> tuple[Any, bool]:
            # Handed back as a value: an event loop would stop at an exception that is no `Exception`.
            try:
                return blocking.run(lambda: contained(work)), False
            except Interrupted:
                return None, True

        alarm = None if self._step.timeout_s is None else loop.call_later(self._step.timeout_s, blocking.interrupt)
        try:
            with self._world.clock.busy():
                result, interrupted = await loop.run_in_executor(self._world.threads, run)
        except asyncio.CancelledError:
            blocking.interrupt()
            raise
        finally:
            if alarm is not None:
                alarm.cancel()
        if interrupted:
            raise self._too_long()
        return result

    # What it shares with others.

    def _look_up(self) -> str | None:
        """The envelope that is in the cache; `None` where this step is the one that computes it, or has no cache."""
        cache = self._step.spec.cache
        if self._step.cache is None or cache is None:
            return None
        workflow = self._run.plan.workflow.name
        scope = "global" if cache.scope == "global" else f"{workflow}.{self._step.id}"
        digest = digest_of(scope, self._step.cache.evaluate(self._scoped))
        found = self._world.shared.cache.enter(digest, self._who, self._world.now(), self._waker(_CACHE, "it is there"))
        if isinstance(found, str):
            return found
        if not found:
            raise Park(_CACHE, "for another step that computes the same")
        self._computes = digest, cache.ttl
        return None

    def _take_turn(self) -> None:
        if self._step.limits is None:
            return
        keys, spec, shared = self._step.limits.evaluate(self._scoped), self._step.spec, self._world.shared.limits
        assert isinstance(keys, dict)
        if spec.rate:
            rate = Rate(str(keys["rate"]), spec.rate.limit, spec.rate.per)
            if wait_s := shared.turn(rate, self._who, self.number, self._world.now()):
                raise Park(_LIMIT, str(rate), wait_s)
        if spec.concurrency:
            concurrency = Concurrency(str(keys["concurrency"]), spec.concurrency.limit)
            if not shared.enter(concurrency, self._who, self._waker(_LIMIT, "its turn came")):
                raise Park(_LIMIT, str(concurrency))

    def _waker(self, kind: str, why: str) -> Callable[[], None]:
        run, step_id = self._run, self.step_id
        return lambda: run.wake_for(step_id, kind, why)

    def _let_go(self, envelope: str = "") -> None:
        """Give back what is shared, and to the cache what was computed."""
        if self._computes and envelope:
            digest, ttl = self._computes
            self._world.shared.cache.put(digest, envelope, self._world.now() + ttl)
        self._world.let_go(self._run, self.step_id)

    # What happens instead when it failed.

    def _alternative(self) -> tuple[int, list[str]] | None:
        """The number of the alternative that was tried last, and what went wrong before it."""
        memory = self._state.memory
        if not (isinstance(memory, dict) and "fallback" in memory):
            return None
        errors = memory["errors"]
        assert isinstance(errors, list)
        return int(str(memory["fallback"])), [str(error) for error in errors]

    @property
    def _denied(self) -> str:
        """What the policy had against a try before this one."""
        memory = self._state.memory
        return str(memory.get("denied", "")) if isinstance(memory, dict) else ""

    def _fell_back(self, number: int, errors: list[str]) -> None:
        done = self.frame(f"fallback{number}")
        if not done.error and done.over:
            data = {"fallback": number, "errors": errors}
            return self._finish(StepStatus.COMPLETED, data, output=self._kept(done.output))
        return self._give_up([*errors, done.error or "it did not end"], number, self._denied or done.denied)

    def _give_up(self, errors: list[str], number: int, denied: str) -> None:
        """Every try has failed: the next alternative, or the end."""
        if number < self._step.fallbacks:
            memory: JsonValue = {"fallback": number + 1, "errors": list[JsonValue](errors), "denied": denied}
            message = f"fallback {number + 1}: {errors[-1]}"
            # Its own act is over, and so is its turn.
            self._world.shared.limits.leave(self._who)
            return self._inside(Inside(message, label=f"fallback{number + 1}", items=[errors[-1]], memory=memory))
        data: dict[str, object] = {"error": errors[0], "errors": errors[1:]} if errors[1:] else {"error": errors[0]}
        if self._step.tolerated:
            data["tolerated"] = True
        return self._finish(StepStatus.FAILED, data, denied=denied)

    # What becomes of it.

    def _unsettled(self) -> Usage:
        """What was used since the run was last told."""
        return Usage(**{name: getattr(self._usage, name) - getattr(self._settled, name) for name in Usage.model_fields})

    def _finish(self, status: StepStatus, data: Mapping[str, object], *, output: str = "", denied: str = "") -> None:
        seconds = round(asyncio.get_running_loop().time() - self._began, 4)
        body = {"attempt": self.number, "seconds": seconds, **data}
        self._run.finish(self._claim, status, body, output=output, usage=self._unsettled(), denied=denied)
        self._let_go(output)

    def _failed(self, error: StepError) -> None:
        message = redact(error.message)[:LONGEST_ERROR]
        tries, retry = self._state.failed_tries + 1, self._step.retry
        if error.retry and tries < retry.max_attempts and (retry.on is None or error.kind in retry.on):
            delay = retry.delay(tries, self._world.random(), error.retry_after_s)
            return self._leave("retry", {"error": message}, wake_in_s=delay)
        return self._give_up([message], 0, message if isinstance(error, Denied) else "")

    def _park(self, park: Park) -> None:
        data = {"message": redact(park.message), "act": park.act}
        wake_in_s = park.wake_in_s
        if park.kind == "timer" and "until" in self.spec.params and isinstance(park.memory, float):
            # Step types know the time of day by the machine's clock, and this one may be ahead of it.
            wake_in_s = park.memory - self._world.now()
        self._leave(park.kind, data, wake_in_s=wake_in_s, bound=park.bound, memory=park.memory, awaited=park.awaited)

    def _inside(self, inside: Inside) -> None:
        items = tuple(self._kept(value) for value in inside.items)
        frames = Frames(inside.label)
        if inside.label is None:
            frames = Frames(None, len(items), inside.window, inside.fail_fast)
        self._leave(
            CHILDREN, {"message": redact(inside.message)}, wake_in_s=inside.wake_in_s, memory=inside.memory,
            frames=frames, items=items,
        )  # fmt: skip

    def _leave(
        self, kind: str, data: Mapping[str, object], *, wake_in_s: float | None, bound: str = "",
        memory: JsonValue = None, awaited: str = "", frames: Frames | None = None, items: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self._run.park(
            self._claim, kind, {"attempt": self.number, **data}, wake_in_s=wake_in_s, usage=self._unsettled(),
            bound=bound, memory=memory, awaited=awaited, frames=frames, items=items,
        )  # fmt: skip
        if kind == _LIMIT and self._computes:
            # Another one may compute it meanwhile; this one keeps its place among those who wait for a slot.
            self._world.shared.cache.forget(self._who)
        elif kind not in (CHILDREN, RUN, _CACHE, _LIMIT):
            # What goes on inside of it goes on in its turn.
            self._let_go()
