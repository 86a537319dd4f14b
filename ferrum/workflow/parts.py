"""The parts of a step as it is written: which of its keys any step may have, which hold other steps, and their names.

Works on the author's own mapping, whatever its shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, TypeAlias

from pydantic import JsonValue

from ferrum.workflow.text import Where

Written: TypeAlias = Mapping[str, JsonValue]

#: What any step may say; everything else belongs to its type.
COMMON: Final = (
    *("type", "needs", "when", "retry", "timeout", "deadline", "on_error", "for_each", "as", "max_parallel"),
    *("repeat", "fallback", "compensate", "cache", "concurrency", "rate"),
)
#: The types that are made of steps, and the key that those stand under.
BODIES: Final[Mapping[str, str]] = {"block": "steps", "switch": "cases", "router": "among"}

#: Longest name of a step or an input.
MAX_NAME: Final = 64
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
#: Ends of ids inside any step that are not the author's, and those inside a switch.
_SET_ASIDE: Final = re.compile(r"compensate|fallback[0-9]+", re.ASCII)
_LABELS: Final = re.compile(r"default|case[0-9]+", re.ASCII)


def is_name(name: str) -> bool:
    return len(name) <= MAX_NAME and _NAME.fullmatch(name) is not None


def is_set_aside(name: str) -> bool:
    """Whether an id that ends so is that of a fallback or a compensation."""
    return _SET_ASIDE.fullmatch(name) is not None


def mapping(value: JsonValue) -> Written:
    """The value, or nothing where it is no mapping."""
    return value if isinstance(value, dict) else {}


def kind_of(step: Mapping[str, object]) -> object:
    """The type that a step is of: what it says, or a block where it has `steps`; `None` where nothing tells."""
    return step.get("type", "block" if "steps" in step else None)


def parts_of(kind: object) -> tuple[str, ...]:
    """The keys of a step of this type that hold steps, besides those that any type may have."""
    if not isinstance(kind, str) or kind not in BODIES:
        return ()
    return (BODIES[kind], "default") if kind == "switch" else (BODIES[kind],)


def labels(cases: Iterable[str]) -> dict[str, str]:
    """What each case of a switch is called in ids: its text where that is a name, else `case` and its number."""
    return {text: text if _is_label(text) else f"case{number}" for number, text in enumerate(cases, 1)}


def _is_label(text: str) -> bool:
    return is_name(text) and not is_set_aside(text) and _LABELS.fullmatch(text) is None


def index_name(item: str) -> str:
    """What the index is called where the item of a `for_each` is called so."""
    return "index" if item == "item" else f"{item}_index"


def inner(step: Written) -> Iterator[tuple[Where, str, Written]]:
    """The steps directly inside one: the way to each, what it is called in ids, and what is written there."""
    for part in (*parts_of(kind_of(step)), "fallback", "compensate"):
        match part, step.get(part):
            case "default" | "compensate", dict(only):
                yield (part,), part, only
            case "fallback", list(several):
                for index, one in enumerate(several):
                    if isinstance(one, dict):
                        yield (part, index), f"fallback{index + 1}", one
            case "steps" | "cases" | "among", dict(named):
                called = labels(named) if part == "cases" else {}
                for name, one in named.items():
                    if isinstance(one, dict):
                        yield (part, name), called.get(name, name), one


def walk(workflow: Written, deep: bool = False) -> Iterator[tuple[Where, Written]]:
    """Every step of a workflow at any depth, in the order of the file; `deep`: also those of workflows in it.

    What is no mapping is left out.
    """
    below = _steps(workflow, ())
    while below:
        where, step = below.pop()
        yield where, step
        if deep and kind_of(step) == "workflow":
            below += _steps(mapping(step.get("workflow")), (*where, "workflow"))
        below += reversed([((*where, *way), one) for way, _, one in inner(step)])


def _steps(workflow: Written, where: Where) -> list[tuple[Where, Written]]:
    """The last one first."""
    steps = mapping(workflow.get("steps"))
    return [((*where, "steps", name), step) for name, step in [*steps.items()][::-1] if isinstance(step, dict)]
