"""What may stand beside what in one step: what its type cannot have, what makes no sense alone, what never ends.

Names and expressions are looked at in `check`. Works on the author's own mapping, whatever its shape; a value of the
wrong type is refused elsewhere and passed over here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, TypeAlias

from pydantic import JsonValue

from ferrum.errors import did_you_mean
from ferrum.workflow.parts import BODIES, Written, is_name, is_set_aside, kind_of, mapping
from ferrum.workflow.text import Where

#: What is wrong, and with which part of the step.
Broken: TypeAlias = tuple[str, Where]

#: What a router may go by.
ROUTER_BY: Final = ("cost", "latency", "tier", "health")

_UNORDERED: Final = ("needs", "when")
_ALTERNATIVE: Final = (*_UNORDERED, "for_each", "as", "max_parallel", "on_error", "fallback", "compensate")
#: What the steps in some parts may not say.
REFUSED: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("cases", "default", "among"), _UNORDERED),
    "fallback": _ALTERNATIVE,
    "compensate": (*_ALTERNATIVE, "cache"),
}
_WHY_REFUSED: Final[Mapping[str, str]] = {
    "cases": "a case cannot have {!r}: it runs when the switch chooses it",
    "default": "a default cannot have {!r}: it runs when the switch finds no case",
    "among": "what is among those of a router cannot have {!r}: it runs when the router chooses it",
    "fallback": "a fallback cannot have {!r}: it runs in the place of its step, when what is before it has failed",
    "compensate": "a compensation cannot have {!r}: it runs once, to undo what its step did",
}
NO_RETRY: Final = {
    "switch": "a switch itself does nothing that could be tried again: put 'retry' on its cases",
    "router": "a router goes on to the next of those it may choose: put 'retry' on what is 'among' them",
}
NO_CACHE: Final = {
    "approval": "what a person decided is not for other runs: an approval has no 'cache'",
    "wait": "a wait leaves nothing that another run could use: it has no 'cache'",
}
_ONLY_FOR_EACH: Final = {
    "as": "'as' is what an item of 'for_each' is called, and there is no 'for_each' here",
    "max_parallel": "'max_parallel' is for the items of 'for_each', and there is no 'for_each' here",
}
_ONLY_FOR_EACH_ERRORS: Final = {
    "collect": "'collect' puts what failed into the list of a 'for_each', which is not here; say 'continue' or 'fail'",
    "fail_fast": "'fail_fast' stops the other items of a 'for_each', which is not here; say 'continue' or 'fail'",
}
_ONLY_LOADED: Final = (
    "a file can only be named in a file, which is then loaded by its own path; here put the workflow itself, under"
    " 'workflow'"
)


def broken(step: Written, part: str) -> Iterator[Broken]:
    """The rules that a step breaks; `part` is where it stands in another one, `steps` for one with others beside it."""
    for key in REFUSED.get(part, ()):
        if key in step:
            yield _WHY_REFUSED[part].format(key), (key,)
    yield from _kind(step)
    yield from _for_each(step)
    yield from _endless(step)


def _kind(step: Written) -> Iterator[Broken]:
    kind = kind_of(step)
    if not isinstance(kind, str):
        return
    if kind in BODIES:
        yield from _body(step, kind)
    if "retry" in step and kind in NO_RETRY:
        yield NO_RETRY[kind], ("retry",)
    if "cache" in step and kind in NO_CACHE:
        yield NO_CACHE[kind], ("cache",)
    if kind == "router":
        yield from _router(step)
    elif kind == "workflow":
        yield from _sub_workflow(step)


def _body(step: Written, kind: str) -> Iterator[Broken]:
    part = BODIES[kind]
    if part not in step:
        yield f"a {kind} has to have {part!r}", ()
    elif step[part] == {}:
        yield f"a {kind} has to have at least one of {part!r}", (part,)


def _router(step: Written) -> Iterator[Broken]:
    for name in mapping(step.get("among")):
        if not is_name(name):
            yield f"{name!r} becomes part of an id: letters, digits and _, no digit first", ("among", name)
        elif is_set_aside(name):
            yield f"a step of a router cannot be called {name!r}: the name is taken", ("among", name)
    match step.get("by"):
        case []:
            yield f"'by' is empty: say {_listed(ROUTER_BY)}, or several of them", ("by",)
        case list(several):
            for index, one in enumerate(several):
                yield from _router_by(one, ("by", index))
        case one:
            yield from _router_by(one, ("by",))


def _router_by(one: JsonValue, where: Where) -> Iterator[Broken]:
    if isinstance(one, str) and one not in ROUTER_BY and "{{" not in one:
        yield f"a router cannot go by {one!r}{did_you_mean(one, ROUTER_BY)}", where


def _sub_workflow(step: Written) -> Iterator[Broken]:
    said = [key for key in ("file", "workflow", "name") if key in step]
    if len(said) > 1:
        yield f"{_listed(said, 'and')} each say which workflow: leave out all but one", (said[1],)
    elif said == ["file"]:
        yield _ONLY_LOADED, ("file",)
    elif not said:
        yield "which workflow? say 'file', 'name', or put it here under 'workflow'", ()
    if "workflow" in step and not isinstance(step["workflow"], dict):
        yield "the workflow itself has to stand here, a mapping with `name` and `steps`", ("workflow",)
    if "version" in step and said and "name" not in said:
        yield "'version' is for a workflow that is registered under a 'name'", ("version",)


def _for_each(step: Written) -> Iterator[Broken]:
    if "for_each" in step:
        if reason := _no_list(step["for_each"]):
            yield reason, ("for_each",)
        return
    for key, reason in _ONLY_FOR_EACH.items():
        if key in step:
            yield reason, (key,)
    on_error = step.get("on_error")
    if isinstance(on_error, str) and on_error in _ONLY_FOR_EACH_ERRORS:
        yield _ONLY_FOR_EACH_ERRORS[on_error], ("on_error",)


def _no_list(value: JsonValue) -> str | None:
    """Why `for_each` cannot be this, where that can be told before a run."""
    wanted = "'for_each' needs a list, or one expression that gives a list"
    match value:
        case list():
            return None
        case str() if "{{" not in value:
            return f'{wanted}: an expression stands in braces, "{{{{ {value or "input.documents"} }}}}"'
        case str() if not (value.startswith("{{") and value.endswith("}}")):
            return f"{wanted}: with something before or after its braces it gives text"
        case str():
            return None
    shown = {dict: "a mapping", bool: "true or false", type(None): "null"}.get(type(value), "a number")
    return f"{wanted}, not {shown}"


def _endless(step: Written) -> Iterator[Broken]:
    repeat = mapping(step.get("repeat"))
    without_end = _is_false(repeat.get("until")) and repeat.get("on_max", "fail") == "fail"
    if without_end:
        yield (
            (
                "a loop without an end: 'until' is never true, so the step can only fail; say when it is done, or"
                " 'on_max: pass' for so many rounds"
            ),
            ("repeat", "until"),
        )
    if "compensate" in step and (without_end or _is_false(step.get("when"))):
        yield "this step never completes, so there is never anything to undo: leave out 'compensate'", ("compensate",)


def _is_false(condition: JsonValue) -> bool:
    return isinstance(condition, str) and condition.strip() == "false"


def _listed(names: tuple[str, ...] | list[str], last: str = "or") -> str:
    quoted = [repr(name) for name in names]
    return f"{', '.join(quoted[:-1])} {last} {quoted[-1]}" if len(quoted) > 1 else quoted[0]
