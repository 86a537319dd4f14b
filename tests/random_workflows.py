"""Random workflows, of everything that `reference` knows: documents that any run ends of, soon and in one way only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import hypothesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

Step: TypeAlias = dict[str, Any]
Document: TypeAlias = dict[str, Any]

#: How many, and which: more of them, and others, make a long hunt of the tests.
EXAMPLES = int(os.environ.get("LANGUAGE_EXAMPLES", "16"))
SEED = int(os.environ.get("LANGUAGE_SEED", "0"))
#: What each run is given.
GIVEN: dict[str, Any] = {"n": [1, 2]}

#: Most steps that are written, and that are run when each loop is as long as it may be.
MOST_WRITTEN, MOST_RUN = 40, 90


@dataclass(frozen=True)
class _Place:
    """What a step can see where it stands, and how often it may be run there."""

    #: Names that give a number or null; those that may give anything.
    numbers: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    #: Names that always give a number: counters of loops.
    counters: tuple[str, ...] = ()
    depth: int = 0
    times: int = 1
    #: Directly inside of a block that is tried again.
    in_tries: bool = False
    #: Inside of what undoes something, which is not undone itself.
    undoing: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return self.numbers + self.others + self.counters

    def deeper(self, times: int = 1, **more: Any) -> _Place:
        return replace(self, **{"depth": self.depth + 1, "times": self.times * times, "in_tries": False, **more})


@dataclass
class _Maker:
    draw: DrawFn
    #: In how many of 100 cases something fails.
    clumsy: int
    written: int = 0
    run: int = 0
    named: int = field(default=0)

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def one_of(self, several: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(several))

    def up_to(self, most: int, least: int = 1) -> int:
        return self.draw(st.integers(least, most))

    def has_room(self, times: int) -> bool:
        return self.written < MOST_WRITTEN and self.run + times <= MOST_RUN

    def workflow(self, depth: int) -> dict[str, Any]:
        """One whose input is a list of two things, of which nothing is known."""
        place = _Place(others=("input.n",), depth=depth)
        steps = self.body(place, self.up_to(14 if depth == 0 else 3, least=5 if depth == 0 else 1))
        outputs = {name: f"{{{{ {name} }}}}" for name in steps if self.chance(60)}
        inputs = {"n": {"type": "array"}}
        return {"name": "random", "inputs": inputs, "steps": steps, **({"outputs": outputs} if outputs else {})}

    def body(self, place: _Place, count: int) -> dict[str, Step]:
        """Steps beside each other."""
        steps: dict[str, Step] = {}
        for _ in range(count):
            if steps and not self.has_room(place.times):
                break
            name = f"s{self.named}"
            self.named += 1
            step, is_number = self.step(place, name, list(steps))
            steps[name] = step
            kind = "numbers" if is_number else "others"
            place = replace(place, **{kind: (*getattr(place, kind), name)})
        # What stands first need not come first.
        return dict(self.draw(st.permutations(list(steps.items())))) if self.chance(30) else steps

    def step(self, place: _Place, name: str, beside: Sequence[str]) -> tuple[Step, bool]:
        """A step among others, and whether it can only give a number."""
        around: Step = {}
        if beside and self.chance(45):
            around["needs"] = sorted(self.draw(st.sets(st.sampled_from(beside), min_size=1, max_size=3)))
        if self.chance(12) and (condition := self.condition(place)):
            around["when"] = condition
        inside = place
        if fans_out := place.times <= 9 and self.chance(15):
            more, inside = self.fan_out(place)
            around |= more
        if self.chance(10) and "on_error" not in around:
            around["on_error"] = "continue"
        step, is_number = self.recovering(inside, name)
        return {**step, **around}, is_number and not fans_out

    def fan_out(self, place: _Place) -> tuple[Step, _Place]:
        size = self.up_to(3, least=0 if self.chance(20) else 1)
        items: Any = [self.value(place) for _ in range(size)]
        if place.others and self.chance(15):
            # Which may well be no list.
            items = f"{{{{ {self.one_of(place.others)} }}}}"
        more: Step = {"for_each": items}
        called, counted = "item", "index"
        if self.chance(50):
            called = more["as"] = f"o{self.named}x{place.depth}"
            counted = f"{called}_index"
        if self.chance(50):
            more["max_parallel"] = self.up_to(2)
        if self.chance(60):
            more["on_error"] = self.one_of(["collect", "collect", "fail_fast", "continue"])
        others = tuple({*place.others, called} - {counted})
        counters = tuple({*place.counters, counted} - {called})
        return more, place.deeper(3, others=others, counters=counters)

    def recovering(self, place: _Place, name: str) -> tuple[Step, bool]:
        """A step with what is done when it fails, and what undoes it."""
        repeat: Step = {}
        inside = place
        if repeats := place.times <= 9 and self.chance(10):
            most = self.up_to(3)
            repeat = {"max": most, "until": f"round >= {self.up_to(3)}"}
            if self.chance(60):
                repeat["on_max"] = "pass"
            others, counters = {*place.others, "previous"}, {*place.counters, "round"}
            inside = place.deeper(most, others=tuple(others - {"round"}), counters=tuple(counters))
        step, is_number = self.act(inside)
        if repeats:
            if is_number and name and self.chance(60):
                repeat["until"] = f"{name} % 2 == 0"
            step["repeat"] = repeat
        if self.chance(8 + self.clumsy // 2):
            place = replace(place, in_tries=False)
            made = [self.act(place.deeper()) for _ in range(self.up_to(2))]
            step["fallback"] = [one for one, _ in made]
            is_number = is_number and all(number for _, number in made)
        if not place.undoing and self.chance(15):
            step["compensate"] = self.undo(place, "params.input" if not repeats and step.get("task") else "output")
        return step, is_number

    def undo(self, place: _Place, seen: str) -> Step:
        place = place.deeper(others=(*place.others, "output", seen), undoing=True)
        return self.act(place)[0]

    def act(self, place: _Place) -> tuple[Step, bool]:
        """What does something itself, or is made of others; whether it can only give a number."""
        composed = place.depth < 4 and self.has_room(place.times * 3)
        kind = self.one_of(["block"] * 3 + ["switch"] * 2 + ["workflow"]) if composed and self.chance(30) else "task"
        if kind == "task" and self.chance(8):
            kind = "wait"
        self.written += 1
        self.run += place.times
        match kind:
            case "task":
                return self.task(place), True
            case "wait":
                return self.wait(), False
            case "block":
                return self.block(place), False
            case "switch":
                return self.switch(place), False
        return self.sub_workflow(place), False

    def task(self, place: _Place) -> Step:
        given: Step = {"values": [self.value(place) for _ in range(self.up_to(3, least=0))]}
        step: Step = {"type": "task", "task": "user.work", "input": given}
        if self.chance(20):
            given["ms"] = self.one_of([1, 5, 20, 60])
        if place.in_tries and self.chance(50):
            given["fail_rounds"] = 1
        elif self.chance(self.clumsy):
            given["fail"] = True
        if self.chance(15):
            step["retry"] = {"max_attempts": self.up_to(3), "backoff": "5ms"}
            if step["retry"]["max_attempts"] > 1 and "fail_rounds" not in given and self.chance(60):
                given["fail_tries"] = 1
        return step

    def wait(self) -> Step:
        if self.chance(self.clumsy):
            return {"type": "wait", "signal": "never", "timeout": "30ms"}
        return {"type": "wait", "for": self.one_of(["1ms", "20ms", "150ms"])}

    def block(self, place: _Place) -> Step:
        step: Step = {}
        inside = place.deeper()
        if place.times <= 9 and self.chance(25):
            step["retry"] = {"max_attempts": self.up_to(2), "backoff": "5ms"}
            inside = place.deeper(2, in_tries=True) if step["retry"]["max_attempts"] > 1 else inside
        step["steps"] = self.body(inside, self.up_to(4))
        if self.chance(30):
            step["output"] = {"of": [f"{{{{ {name} }}}}" for name in step["steps"] if self.chance(60)]}
        if self.chance(50):
            step["type"] = "block"
        return step

    def switch(self, place: _Place) -> Step:
        inside = place.deeper()
        texts = self.draw(
            st.lists(st.sampled_from(["0", "1", "2", "two words", "name"]), min_size=1, max_size=3, unique=True)
        )
        step: Step = {"type": "switch", "value": self.one_of(["name", "two words", "none"])}
        if numbers := place.numbers + place.counters:
            one = self.one_of(numbers)
            step["value"] = f"{{{{ {one} == null ? 0 : {one} % 3 }}}}"
        step["cases"] = {text: self.branch(inside) for text in texts}
        if self.chance(60):
            step["default"] = self.branch(inside)
        return step

    def branch(self, place: _Place) -> Step:
        """What may have anything but others beside it."""
        around: Step = {}
        if place.times <= 9 and self.chance(10):
            around, place = self.fan_out(place)
        elif self.chance(10):
            around = {"on_error": "continue"}
        return {**self.recovering(place, "")[0], **around}

    def sub_workflow(self, place: _Place) -> Step:
        inner = _Maker(self.draw, self.clumsy, MOST_WRITTEN - 6, MOST_RUN - 8)
        step: Step = {"type": "workflow", "workflow": inner.workflow(place.depth + 2)}
        step["input"] = {"n": [self.value(place), self.value(place)]}
        if self.chance(20):
            step["retry"] = {"max_attempts": 2, "backoff": "5ms"}
        return step

    def value(self, place: _Place) -> Any:
        """A number, or what stands under a name; a sum of counters, sometimes."""
        if place.counters and self.chance(20):
            return f"{{{{ {self.one_of(place.counters)} * 10 + {self.up_to(9)} }}}}"
        if place.names and self.chance(70):
            return f"{{{{ {self.one_of(place.names)} }}}}"
        return self.up_to(9)

    def condition(self, place: _Place) -> str | None:
        if place.counters and self.chance(30):
            return f"{self.one_of(place.counters)} % 2 == {self.up_to(1, least=0)}"
        if not place.numbers:
            return None
        one = self.one_of(place.numbers)
        return self.one_of([f"{one} == null || {one} % 2 == 0", f"{one} != null && {one} % 3 < 2", f"{one} != null"])


@st.composite
def workflows(draw: DrawFn) -> dict[str, Any]:
    """A document that is valid; of three, one has nothing in it that fails."""
    return _Maker(draw, clumsy=draw(st.sampled_from([0, 6, 18]))).workflow(0)


def some(count: int, seed: int) -> list[Document]:
    """So many random workflows, the same ones for the same seed."""
    found: list[Document] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(workflows())
    def draw(document: Document) -> None:
        found.append(document)

    draw()
    return found
