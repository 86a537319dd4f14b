"""Starting a run and publishing what is to be run: the one room that hands messages to Celery."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import redis
from pydantic import JsonValue

from ferrum.artifacts import Artifacts
from ferrum.errors import InputError
from ferrum.plan import Plan
from ferrum.record import LANES, Record, Resend, new_run_id
from ferrum.refusals import in_a_hurry

if TYPE_CHECKING:
    from celery import Celery
    from celery.canvas import Signature

log = logging.getLogger(__name__)

#: How a message is published that the repair will send if need be.
_BRIEFLY = {"retry_policy": {"max_retries": 2, "interval_start": 0.1, "interval_step": 0.2, "interval_max": 0.3}}


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
        heads_first = [Resend(run_id, head, "head", began.lane) for head in reversed(list(heads.values()))]
        hand_over(app, lambda _: plan, heads_first)
    return began.run_id


def hand_over(app: Celery, plan_of: Callable[[str], Plan], sends: Sequence[Resend]) -> None:
    """Publish all of this, for somebody who does not want to wait for a broker that is away.

    It need not be there: the record knows what is to run, and the sweeper of a worker sends it within seconds.
    """
    from kombu.exceptions import OperationalError

    away = (OperationalError, redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)
    try:
        with in_a_hurry():
            send(app, plan_of, sends, **_BRIEFLY)
    except away as error:
        log.info("%d messages are left to the repair: %s", len(sends), error)


def send(app: Celery, plan_of: Callable[[str], Plan], sends: Sequence[Resend], **options: object) -> None:
    """Publish all of this: what became ready, what was parked, what was lost.

    `options` are Celery's, for each message. Raises kombu's `OperationalError` where the broker stays away.
    """
    if not sends:
        return
    canvases = [_canvas(app, plan_of, what) for what in sends]
    with app.producer_or_acquire() as producer:
        if len(canvases) == 1:
            canvases[0].apply_async(producer=producer, **options)
            return
        # One round trip for many messages; not for all at once, so that the first are worked on meanwhile.
        for begin in range(0, len(canvases), 100):
            _send_batch(producer, canvases[begin : begin + 100], options)


def _send_batch(producer: Any, canvases: Sequence[Signature], options: Mapping[str, object]) -> None:
    from kombu.exceptions import BatchPublishError

    try:
        with producer.batch():
            for canvas in canvases:
                canvas.apply_async(producer=producer, **options)
    except BatchPublishError:
        # Kombu tries a batch once. Each by itself is tried until the broker takes it; one that comes twice is dropped.
        for canvas in canvases:
            canvas.apply_async(producer=producer, **options)


def _canvas(app: Celery, plan_of: Callable[[str], Plan], what: Resend) -> Signature:
    if what.signature == "head":
        plan = plan_of(what.run_id)
        return plan.canvas(what.run_id, *plan.starting_with(what.step_id), lane=what.lane, app=app)
    if not what.signature:
        return plan_of(what.run_id).signature(what.run_id, what.step_id, what.lane, app)
    from celery import signature

    return signature(json.loads(what.signature), app=app)
