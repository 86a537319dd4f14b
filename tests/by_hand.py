"""A run that a test moves by hand, call by call, as workers, people and the sweeper would."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ferrum.governance.budget import Limits, ceilings
from ferrum.plan import Plan
from ferrum.record import Claimed, Dropped, Ended, Held, Passed, Record, Resend, new_run_id
from ferrum.results import StepStatus, Usage
from ferrum.workflow import Workflow

_numbers = itertools.count()


def workflow_of(needs: Mapping[str, Iterable[str]], **more: Any) -> Workflow:
    steps = {step: {"type": "task", "task": "t", "needs": list(before)} for step, before in needs.items()}
    return Workflow.of({"name": "by-hand", "steps": steps, **more})


class ByHand:
    """Its queue is its own, so that no other run's messages have a say in what is sent again."""

    def __init__(
        self,
        record: Record,
        needs: Mapping[str, Iterable[str]] | Workflow,
        *,
        input: str = '{"v":{}}',
        key: str | None = None,
        limits: Limits | None = None,
        wall_time_s: float | None = None,
        keep_s: float = 60,
        **more: Any,
    ) -> None:
        self.record = record
        self.plan = Plan(needs if isinstance(needs, Workflow) else workflow_of(needs, **more))
        self.queue = f"q-{uuid.uuid4().hex[:8]}"
        self.new = replace(
            self.plan.new_run(new_run_id(key), key, input),
            plan=f"{self.plan.digest}-{self.queue}",
            nodes=self._nodes,
            roots=tuple((step.id, self.queue, 0) for step in self.plan.roots),
            limits=ceilings(limits or Limits()),
            wall_time_s=wall_time_s,
            keep_s=keep_s,
            # No other test's runs put it behind them.
            tenant=self.queue,
        )
        self.run_id = record.create(self.new).run_id
        self.held: dict[str, Held] = {}

    def _nodes(self) -> dict[str, str]:
        def moved(text: str) -> str:
            node = json.loads(text)
            if "r" in node:
                node["r"] = [[name, self.queue, segment, late] for name, _, segment, late in node["r"]]
            else:
                edges = [
                    [step, n, canvas, self.queue, segment, late] for step, n, canvas, _, segment, late in node["x"]
                ]
                node |= {"q": self.queue, "x": edges, "i": 1}
            return json.dumps(node)

        return {step: moved(node) for step, node in self.plan.nodes().items()}

    def copy(self, step: str) -> Held:
        """What a worker would claim with that gets another copy of the step's message."""
        return Held(self.run_id, step, f"w#{next(_numbers)}")

    def claim(self, step: str, *, lease_s: float = 60, worker: str = "w") -> Claimed | Passed | Dropped | Ended:
        self.held[step] = self.copy(step)
        return self.record.claim(self.held[step], worker, lease_s)

    def begin(self, step: str, *, lease_s: float = 60, worker: str = "w") -> Claimed:
        claimed = self.claim(step, lease_s=lease_s, worker=worker)
        assert isinstance(claimed, Claimed), claimed
        return claimed

    def finish(
        self,
        step: str,
        status: StepStatus = StepStatus.COMPLETED,
        *,
        output: str = '{"v":1}',
        usage: Usage | None = None,
        denied: str = "",
    ) -> Ended:
        data: dict[str, object] = {"seconds": 0.1}
        if status is not StepStatus.COMPLETED:
            output = ""
            data["error" if status is StepStatus.FAILED else "reason"] = "no"
        return self.record.finish(
            self.held[step], status, data, output=output, usage=usage or Usage(), denied=denied
        )  # fmt: skip

    def do(self, *steps: str) -> Ended:
        """Claim and complete these, one after the other."""
        ended = Ended()
        for step in steps:
            self.begin(step)
            ended = self.finish(step)
        return ended

    def lose(self, step: str, worker: str = "w") -> list[Resend]:
        """Its worker dies while it runs it, and the sweeper finds that; what is sent. Nobody waits until it may run."""
        self.record.nudge(self.run_id)
        self.begin(step, lease_s=0, worker=worker)
        return self.sweep()

    def park(
        self,
        step: str,
        kind: str = "approval",
        *,
        wake_in_s: float | None = None,
        usage: Usage | None = None,
        bound: str = "",
        **more: Any,
    ) -> Ended:
        return self.record.park(
            self.held[step], kind, "its signature", {"attempt": 1},
            wake_in_s=wake_in_s, usage=usage or Usage(), bound=bound, **more,
        )  # fmt: skip

    def sweep(self, *, empty: bool = True, resend_after_s: float = 60, reap: bool = True) -> list[Resend]:
        found = self.record.sweep({(self.queue, self.new.lane): empty}, resend_after_s=resend_after_s, reap=reap)
        return [one for one in found.sends if one.run_id == self.run_id]

    def happened(self) -> list[str]:
        """The run's events, as `type` or `type step`."""
        return [f"{event.type} {getattr(event, 'step', '')}".strip() for event in self.record.events(self.run_id)]
