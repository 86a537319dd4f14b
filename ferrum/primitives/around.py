"""What goes around flows: choices, tries, limits, rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from ferrum.primitives.flow import FLOWING, Chosen, Flow, OneStep, Sequential, Steplike, lift, yes_or_no
from ferrum.workflow.rules import NO_RETRY

#: Where a key of a step lies around what the step does; the more, the further out.
_LEVELS: Final[Mapping[str, int]] = {
    "timeout": 1,
    "rate": 2,
    "concurrency": 2,
    "retry": 3,
    "repeat": 4,
    "fallback": 5,
    "cache": 6,
    "compensate": 7,
    **dict.fromkeys(("for_each", "as", "max_parallel"), 8),
    **dict.fromkeys(("on_error", "deadline", "when", "needs"), 9),
}


def Conditional(condition: str | Steplike, then: Steplike, otherwise: Steplike | None = None) -> Flow:
    """`then` where the condition is true, else `otherwise`; both are called with what flows in.

    The condition is an expression as in `when`, or a function that is called with what flows in and returns true or
    false. Without `otherwise` it is skipped where it is false, and so is what comes only from it.
    """
    choices = {"then": lift(then), **({} if otherwise is None else {"otherwise": lift(otherwise)})}
    switch = OneStep("switch", choices=choices)
    if isinstance(condition, str):
        return replace(switch, params={"value": yes_or_no(f"({condition})")})
    return Chosen(lift(condition), switch, yes_or_no=True)


def Switch(on: str | Steplike, cases: Mapping[str, Steplike], default: Steplike | None = None) -> Flow:
    """The case of this value, else the default; without one it is skipped.

    `on` is text with an expression, `"{{ classify.kind }}"`, or a function that is called with what flows in. Whatever
    is chosen is called with what flows in, not with the value.
    """
    lifted = {text: lift(case) for text, case in cases.items()}
    switch = OneStep("switch", choices=lifted, otherwise=None if default is None else lift(default))
    if isinstance(on, str):
        return replace(switch, params={"value": on})
    return Chosen(lift(on), switch, yes_or_no=False)


def Router(among: Mapping[str, Steplike], *, by: str | Sequence[str] = "health", **limits: Any) -> Flow:
    """The best of these, by `cost`, `latency`, `tier` or `health`, or several of them; when it fails, the next.

    What is known of each is said by `with_(cost=…, latency=…, tier=…, target=…)`. `limits` are `max_cost`,
    `max_latency` and `min_tier`.
    """
    params = {"by": by if isinstance(by, str) else list(by), **limits}
    return OneStep("router", params=params, choices={name: lift(one) for name, one in among.items()})


def Retry(flow: Steplike, max_attempts: int = 3, **more: Any) -> Flow:
    """Try it again when it fails, all of it; `more` is `backoff`, `factor`, `max_delay` and `on`, as in a file."""
    return around_it(flow, retry={"max_attempts": max_attempts, **more})


def Timeout(flow: Steplike, seconds: float | str) -> Flow:
    """It fails when it takes longer. Around a `Retry` it is for all tries together, inside for each."""
    return around_it(flow, timeout=seconds)


def Fallback(flow: Steplike, *others: Steplike) -> Flow:
    """The first that does not fail, in this order; all are called with what flows in, and may use `{{ error }}`."""
    return around_it(flow, fallback=others)


def Saga(*steps: Steplike | tuple[Steplike, Steplike]) -> Flow:
    """One after the other, and when the run fails, what was done is undone, the last first: `(do, undo)`.

    A function that undoes is called with what its step returned. What needs no undoing stands alone.
    """
    return Sequential(*(around_it(one[0], compensate=one[1]) if isinstance(one, tuple) else one for one in steps))


def cached(flow: Steplike, *, ttl: float | str, key: Any = FLOWING, scope: str = "workflow") -> Flow:
    """Take the output of an earlier run for this long, where `key` was the same; by default what flows in is the key.

    With `scope="global"` runs of other workflows count, too.
    """
    return around_it(flow, cache={"key": key, "ttl": ttl, "scope": scope})


def for_each(
    flow: Steplike,
    over: Any = FLOWING,
    *,
    as_: str | None = None,
    max_parallel: int | None = None,
    on_error: str | None = None,
) -> Flow:
    """Once for each item, which it is called with; its output is the list of theirs.

    The items are what flows in: a list, or all where several outputs do. `over` is another list, or text with an
    expression that gives one; at the start of a flow it has to be there, `over="{{ input.documents }}"`.
    """
    keys = {"for_each": over, "as": as_, "max_parallel": max_parallel, "on_error": on_error}
    return around_it(flow, **{key: value for key, value in keys.items() if value is not None})


def repeat(
    flow: Steplike, *, until: str | Steplike, max: int, carry: bool = False, on_max: str | None = None
) -> Flow:  # fmt: skip
    """Again and again until that is true, at most `max` times; its output is that of the last round.

    `until` is an expression, over the names of the steps inside, or a function that is called with the outputs of the
    round and returns true or false. Each round is called with what flows in; with `carry` the first argument of each
    but the first is what the round before left.
    """
    said = {"until": until if isinstance(until, str) else FLOWING, "max": max, "carry": carry}
    said |= {} if on_max is None else {"on_max": on_max}
    if isinstance(until, str):
        return around_it(flow, repeat=said)
    return OneStep("block", body=lift(flow), until=lift(until), keys={"repeat": said})


def around_it(flow: Steplike, **keys: Any) -> OneStep:
    """The flow with this around all that it says already."""
    one = lift(flow).as_one()
    further_in = min(_LEVELS[key] for key in keys) <= max((_LEVELS.get(key, 0) for key in one.said), default=0)
    if further_in or ("retry" in keys and one.kind in NO_RETRY):
        one = OneStep("block", body=one)
    return one.saying(keys)
