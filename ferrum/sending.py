"""Starting a run and publishing what is to be run: the one room that hands messages to Celery."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import JsonValue

from ferrum.artifacts import Artifacts
from ferrum.errors import InputError
from ferrum.plan import Plan
from ferrum.record import LANES, Record, Resend, new_run_id

if TYPE_CHECKING:
    from celery import Celery
    from celery.canvas import Signature


def start(
    app: Celery, to: Record, store: Artifacts, plan: Plan, given: Mapping[str, JsonValue], *, key: str | None,
    priority: int | None = None, tenant: str | None = None,
) -> str:  # fmt: skip
    """Begin a run of this plan through these; raises `InputError`. `priority` is used instead of the workflow's."""
    if priority is not None and (isinstance(priority, bool) or priority not in range(LANES)):
        raise InputError(f"a priority is a whole number from 0 to {LANES - 1}, not {priority!r}")
    checked = plan.workflow.check_input(given)
    run_id = new_run_id(key)
    run = plan.new_run(run_id, key, store.keep(checked).dumps(), priority=priority, tenant=tenant)
    began = to.create(run)
    # No lane: this key was used before. Otherwise the record is there before the first message leaves: a quick worker
    # may claim a step before `send` has returned.
    if began.lane is not None:
        heads = {plan.segment_of[step.id].id: step.id for step in reversed(plan.roots)}
        send(app, lambda _: plan, [Resend(run_id, head, "head", began.lane) for head in reversed(list(heads.values()))])
    return began.run_id


def send(app: Celery, plan_of: Callable[[str], Plan], sends: Sequence[Resend]) -> None:
    """Publish all of this: what became ready, what was parked, what was lost."""
    if not sends:
        return
    canvases = [_canvas(app, plan_of, what) for what in sends]
    with app.producer_or_acquire() as producer:
        if len(canvases) == 1:
            canvases[0].apply_async(producer=producer)
            return
        # One round trip for many messages; not for all at once, so that the first are worked on meanwhile.
        for begin in range(0, len(canvases), 100):
            with producer.batch():
                for canvas in canvases[begin : begin + 100]:
                    canvas.apply_async(producer=producer)


def _canvas(app: Celery, plan_of: Callable[[str], Plan], what: Resend) -> Signature:
    if what.signature == "head":
        plan = plan_of(what.run_id)
        return plan.canvas(what.run_id, *plan.starting_with(what.step_id), lane=what.lane, app=app)
    if not what.signature:
        return plan_of(what.run_id).signature(what.run_id, what.step_id, what.lane, app)
    from celery import signature

    return signature(json.loads(what.signature), app=app)
