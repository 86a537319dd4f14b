"""The peer: a Celery app of its own with ferrum's own worker settings, no-op tasks, and results on."""

from __future__ import annotations

import os
import time

from celery import Celery

import celeryconfig
from ferrum.local.redis import celery_url

_url = celery_url(os.environ["FERRUM_REDIS_URL"])
app = Celery("plain", broker=_url, backend=_url)
app.config_from_object(celeryconfig)
app.conf.update(task_default_queue="plain", task_routes=None, task_ignore_result=False)


@app.task(name="plain.nothing")
def nothing() -> None:
    pass


@app.task(name="plain.nap")
def nap(seconds: float) -> None:
    time.sleep(seconds)
