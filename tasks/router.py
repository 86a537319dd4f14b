"""`type: router`: the best of several steps, by tier, cost, latency or health; the next one when it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, JsonValue

from ferrum.errors import Denied, InputError, StepError
from ferrum.steps import Attempt, Composed, Health, Inside, Params, StepType
from ferrum.workflow import Route, Step

By = Literal["tier", "cost", "latency", "health"]


class RouterParams(Params):
    by: By | list[By] = Field("health", description="What decides; of several, the next one where the first is equal.")
    max_cost: float | None = Field(None, description="No step that costs more.")
    max_latency: float | None = Field(None, description="No step that takes longer, in ms.")
    min_tier: int | None = Field(None, description="No step of a lower tier.")


class Router(StepType[RouterParams]):
    """Its output is that of the step it chose. A step whose target is failing in all workers is not chosen."""

    name = "router"
    params = RouterParams
    passes_on = False
    composed = True

    def run(self, params: RouterParams, attempt: Attempt) -> JsonValue:
        whole: Composed = attempt  # type: ignore[assignment] # composed types are given one
        memory = whole.memory if isinstance(whole.memory, dict) else {}
        tried: list[str] = [str(name) for name in _list(memory.get("tried"))]
        errors: list[str] = [str(error) for error in _list(memory.get("errors"))]
        among = whole.spec.among
        denied = bool(memory.get("denied"))
        if tried:
            name = tried[-1]
            done = whole.frame(name)
            took_ms = (whole.now() - float(str(memory["since"]))) * 1000
            denied = denied or bool(done.denied)
            if not done.denied:
                whole.report(
                    target_of(name, among[name], whole.address), ok=done.over and not done.error, latency_ms=took_ms
                )
            if done.over and not done.error:
                return done.output
            errors.append(f"{name}: {done.error or 'took too long'}")
        targets = {name: target_of(name, step, whole.address) for name, step in among.items() if name not in tried}
        health = dict(whole.health([*targets.values()]))
        while True:
            ends = {name: health[target] for name, target in targets.items()}
            best, why = _choose(params, {name: among[name] for name in targets}, ends)
            if best is None:
                said = "; ".join([*errors, *([why] if why else [])])
                raise Denied(said) if denied else StepError(said, retry=True)
            if whole.allowed(targets[best]):
                break
            # Another step tries just now whether it is well again.
            health[targets[best]] = Health(usable=False)
        tried.append(best)
        more: dict[str, JsonValue] = {"tried": [*tried], "errors": [*errors], "denied": denied, "since": whole.now()}
        raise Inside(f"{best!r}, {why}", label=best, memory=more, wake_in_s=attempt.timeout_s)


def _list(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else []


def target_of(name: str, step: Step, address: str) -> str:
    """What the health of one of a router's steps is kept under; without a better name it is this router's own."""
    if step.route is not None and step.route.target is not None:
        return step.route.target
    model, tool = step.params.get("model"), step.params.get("tool")
    if isinstance(model, str):
        return _resolved(model)
    return tool.partition(".")[0] if isinstance(tool, str) else f"{address}.{name}"


def _resolved(model: str) -> str:
    """The model that is called, by which its health is known to all steps; the name itself where that is not known."""
    # Here and not above: who only plans a workflow needs no prices.
    from ferrum.models import prices

    try:
        return prices.resolve(model)
    except InputError:
        return model


def _choose(params: RouterParams, among: Mapping[str, Step], health: Mapping[str, Health]) -> tuple[str | None, str]:
    """The best of them and why; without one, why there is none."""
    left = {name: step.route or Route() for name, step in among.items()}
    out: list[str] = []
    for name, route in list(left.items()):
        if reason := _unfit(params, route, health[name]):
            out.append(f"{name!r} {reason}")
            del left[name]
    if not left:
        return None, f"nothing is left to choose: {', '.join(out)}" if out else ""
    by = [params.by] if isinstance(params.by, str) else params.by
    ranks = {name: tuple(_rank(one, route, health[name]) for one in by) for name, route in left.items()}
    best = min(left, key=lambda name: ranks[name])
    why = f"the best by {', '.join(by)} of {len(left)}" if len(left) > 1 else "the only one left"
    return best, why + (f"; {', '.join(out)}" if out else "")


def _unfit(params: RouterParams, route: Route, health: Health) -> str:
    if not health.usable:
        return "is failing"
    if params.max_cost is not None and (route.cost or 0) > params.max_cost:
        return "costs too much"
    if params.max_latency is not None and (_latency(route, health) or 0) > params.max_latency:
        return "is too slow"
    if params.min_tier is not None and (route.tier or 0) < params.min_tier:
        return "is of too low a tier"
    return ""


def _latency(route: Route, health: Health) -> float | None:
    return health.latency_ms if health.latency_ms is not None else route.latency


def _rank(by: By, route: Route, health: Health) -> float:
    """Less is better; what is not known comes last."""
    unknown = float("inf")
    match by:
        case "tier":
            return -route.tier if route.tier is not None else unknown
        case "cost":
            return route.cost if route.cost is not None else unknown
        case "latency":
            latency = _latency(route, health)
            return latency if latency is not None else unknown
        case "health":
            return health.failures
