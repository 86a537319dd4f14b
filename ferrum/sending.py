"""Starting a run and publishing what is to be run: the one room that hands messages to Celery."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import JsonValue

from ferrum.artifacts import Artifacts
from ferrum.governance.budget import Limits, ceilings
from ferrum.plan import Plan, Segment
from ferrum.record import NewRun, Record, Resend, new_run_id
from ferrum.settings import settings

if TYPE_CHECKING:
    from celery import Celery


def start(
    app: Celery, to: Record, store: Artifacts, plan: Plan, given: Mapping[str, JsonValue], *, key: str | None
) -> str:
    """Begin a run of this plan through these; raises `InputError`."""
    checked = plan.workflow.check_input(given)
    run_id = new_run_id(key)
    began = to.create(_new_run(run_id, key, plan, store.keep(checked).dumps()))
    # Another run means that this key was used before. Otherwise the record is there before the first message leaves:
    # a quick worker may claim a step before `send` has returned.
    if began == run_id:
        roots = [step.id for step in plan.roots]
        send(app, run_id, plan, plan.starting_with(roots))
    return began


def _new_run(run_id: str, key: str | None, plan: Plan, given: str) -> NewRun:
    workflow = plan.workflow
    budget = workflow.budget
    limits = Limits(**budget.model_dump(exclude={"wall_time"})) if budget else Limits()
    return NewRun(
        run_id=run_id,
        key=key,
        plan=plan.digest,
        document=lambda: plan.document,
        nodes=plan.nodes,
        steps=len(plan.steps),
        roots=tuple((step.id, step.type.queue) for step in plan.roots),
        workflow=workflow.name,
        version=workflow.version,
        input=given,
        has_outputs=bool(workflow.outputs),
        limits=ceilings(limits),
        wall_time_s=budget.wall_time if budget else None,
        keep_s=settings().keep_runs,
    )


def send(app: Celery, run_id: str, plan: Plan, segments: Sequence[Segment], alone: Sequence[str] = ()) -> None:
    """Publish these segments, and these steps off their canvas."""
    if not segments and not alone:
        return
    canvases = [plan.canvas(run_id, segment) for segment in segments]
    canvases += [plan.signature(run_id, step) for step in alone]
    with app.producer_or_acquire() as producer:
        if len(canvases) == 1:
            canvases[0].apply_async(producer=producer)
            return
        # One round trip for many messages; not for all at once, so that the first are worked on meanwhile.
        for begin in range(0, len(canvases), 100):
            with producer.batch():
                for canvas in canvases[begin : begin + 100]:
                    canvas.apply_async(producer=producer)


def resend(app: Celery, plan: Plan, what: Resend) -> None:
    """Publish one step that was parked or lost."""
    if what.signature == "head":
        send(app, what.run_id, plan, plan.starting_with([what.step_id]))
    elif not what.signature:
        send(app, what.run_id, plan, [], [what.step_id])
    else:
        _again(app, what.signature)


def _again(app: Celery, document: str) -> None:
    from celery import signature

    signature(json.loads(document), app=app).apply_async()
