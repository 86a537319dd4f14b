"""What runs were, held against what `reference` says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from fleet import assert_events_agree
from reference import COMPLETED, Expected, Seen

import ferrum
from ferrum.events import Event, RunCreated, StepCompleted
from ferrum.runs import RunView, record

Document = dict[str, Any]


@dataclass(frozen=True)
class Story:
    """What the events of one run tell, by their places in the order."""

    run_id: str
    events: Sequence[Event]

    @classmethod
    def of(cls, run_id: str) -> Story:
        return cls(run_id, record().events(run_id))

    @cached_property
    def view(self) -> RunView:
        return ferrum.runs.show(self.run_id)

    @cached_property
    def of_steps(self) -> dict[str, list[tuple[int, str]]]:
        """For each step where its events are, and of what type."""
        found: dict[str, list[tuple[int, str]]] = {}
        for place, event in enumerate(self.events):
            if step := getattr(event, "step", None):
                found.setdefault(step, []).append((place, event.type))
        return found

    def first(self, step: str) -> int:
        return self.of_steps[step][0][0]

    def end(self, step: str) -> int:
        """Where it ended; beyond all where it did not."""
        ends = [place for place, kind in self.of_steps.get(step, ()) if kind in _ENDS]
        return ends[0] if ends else len(self.events)

    def span(self, prefix: str) -> tuple[int, int] | None:
        """From where to where anything happened in there by itself; what is undone later is not of it."""
        places = [
            place
            for step, events in self.of_steps.items()
            if step == prefix or step.startswith(f"{prefix}.")
            if ".compensate" not in step.removeprefix(prefix)
            for place, kind in events
            if kind != "step.cancelled"
        ]
        return (min(places), max(places)) if places else None

    @property
    def completed(self) -> list[str]:
        """The steps that completed, in order."""
        return [event.step for event in self.events if isinstance(event, StepCompleted)]

    @property
    def undoing(self) -> list[str]:
        """The steps that undo another, in the order in which they began."""
        return [step for step in self.of_steps if step.endswith(".compensate")]


_ENDS = frozenset({"step.completed", "step.failed", "step.skipped", "step.cancelled"})


@dataclass
class Comparison:
    """What the runs of a fleet were against what they should have been."""

    redis_url: str
    #: How often each step acted, by its key.
    effects: Counter[str]
    #: Workers died: a step may have acted more than once.
    killed: bool
    #: The runs inside of others, by run and step, in order.
    inside: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, redis_url: str, acted: Counter[str], runs: Sequence[str], *, killed: bool) -> Comparison:
        """Of these runs and all inside of them."""
        parents: dict[tuple[str, str], list[str]] = {}
        for run in sorted(record().runs(limit=100_000), key=lambda run: run.run_id):
            created = record().events(run.run_id)[0]
            assert isinstance(created, RunCreated)
            if created.parent:
                parents.setdefault(created.parent, []).append(run.run_id)
        family = set(runs)
        while more := {run for (above, _), inside in parents.items() if above in family for run in inside} - family:
            family |= more
        effects = Counter({key: times for key, times in acted.items() if key.partition(".")[0] in family})
        return cls(
            redis_url, effects, killed, {above: inside for above, inside in parents.items() if above[0] in family}
        )

    def check(self, run_id: str, said: Expected, *, loose: bool = False) -> None:
        """`loose`: the run is inside of what may have been cancelled."""
        story = Story.of(run_id)
        view = story.view
        cut_off = loose and view.status.value == "cancelled"
        self._same(run_id, "status", view.status.value, "cancelled" if cut_off else said.status)
        if view.status.value == COMPLETED:
            self._same(run_id, "outputs", _without_errors(view.outputs), _without_errors(said.outputs))
        steps = {step.step_id: step for step in view.steps}
        known = said.steps | {step: seen for undo in said.undo.values() for step, seen in undo.items()}
        for step in steps.keys() - known.keys():
            self._wrong(run_id, f"{step} should not be there")
        for step, seen in said.steps.items():
            self._step(story, step, seen, cut_off)
        self._order(story, said)
        self._undone(story, said)
        assert_events_agree(self.redis_url, run_id)

    def _step(self, story: Story, step: str, seen: Seen, cut_off: bool) -> None:
        found = {one.step_id: one for one in story.view.steps}.get(step)
        status = found.status.value if found else "absent"
        loose = cut_off or seen.loose
        if loose and status in ("absent", "cancelled", "pending"):
            pass
        else:
            self._same(story.run_id, f"status of {step}", status, seen.status)
        if found and status == COMPLETED:
            self._same(story.run_id, f"output of {step}", _without_errors(found.output), _without_errors(seen.output))
        ends = [kind for _, kind in story.of_steps.get(step, ()) if kind in _ENDS]
        if len(ends) > 1 or (ends and story.of_steps[step][-1][1] not in _ENDS):
            self._wrong(story.run_id, f"{step} went on after its end: {story.of_steps[step]}")
        self._acted(f"{story.run_id}.{step}", seen.effects, loose)
        runs = self.inside.pop((story.run_id, step), [])
        if len(runs) > len(seen.runs) or (len(runs) < len(seen.runs) and not loose):
            self._wrong(story.run_id, f"{step} has the runs {runs}, and should have {len(seen.runs)}")
        for inner, said in zip(runs, seen.runs, strict=False):
            self.check(inner, said, loose=loose)

    def _acted(self, key: str, times: int, loose: bool) -> None:
        acted = self.effects.pop(key, 0)
        least = 0 if loose else times
        if acted < least or (acted > times and not (self.killed and times)):
            self._wrong(key, f"acted {acted} times, not {times}")

    def _order(self, story: Story, said: Expected) -> None:
        for step, seen in said.steps.items():
            if step in story.of_steps:
                for before in seen.after:
                    if story.end(before) > story.first(step):
                        self._wrong(story.run_id, f"{step} began before {before} was over")
        for step, events in story.of_steps.items():
            own = [place for place, kind in events if kind != "step.cancelled"]
            around = _around(step, story)
            if around and own and not (story.first(around) < own[0] and own[-1] < story.end(around)):
                self._wrong(story.run_id, f"{step} was not inside of {around}")
        for prefixes, at_a_time in said.in_turn:
            spans = [span for prefix in prefixes if (span := story.span(prefix))]
            if any(sum(begin <= at <= end for begin, end in spans) > at_a_time for at, _ in spans):
                self._wrong(story.run_id, f"more than {at_a_time} of {prefixes} at a time: {spans}")

    def _undone(self, story: Story, said: Expected) -> None:
        undone: list[str] = []
        if story.view.status.value != COMPLETED:
            undone = [f"{step}.compensate" for step in reversed(story.completed) if step in said.undo]
        self._same(story.run_id, "undone", story.undoing, undone)
        for one, after in pairwise(undone):
            if story.end(one) > story.first(after):
                self._wrong(story.run_id, f"{after} began before {one} was over")
        for step in undone:
            for id, seen in said.undo[step.removesuffix(".compensate")].items():
                self._step(story, id, seen, cut_off=False)

    def _same(self, run_id: str, what: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            self._wrong(run_id, f"{what} is {found!r}, not {wanted!r}")

    def _wrong(self, run_id: str, message: str) -> None:
        self.wrong.append(f"{run_id}: {message}")

    def nothing_else(self) -> None:
        """Nothing acted and no run was begun that nobody asked for."""
        self.wrong += [f"{key} acted, and should not have" for key in self.effects]
        self.wrong += [f"{step} of {run} has the runs {runs}" for (run, step), runs in self.inside.items()]


def _around(step: str, story: Story) -> str | None:
    """The step that this one is inside of."""
    parts = step.split(".")
    if parts[-1] == "compensate":
        return None
    above = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((one for one in above if one in story.of_steps), None)


def _without_errors(value: Any) -> Any:
    """Which of several failed steps an error names, nobody knows before."""
    if isinstance(value, dict):
        return {name: _without_errors(one) for name, one in value.items() if name != "error"}
    return [_without_errors(one) for one in value] if isinstance(value, list) else value
