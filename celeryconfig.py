"""Celery's settings. Each one that is not Celery's default says what it earns.

ferrum's own settings are in the environment (`ferrum/settings.py`). What stands under "nothing is lost" is checked when
a worker starts: another module of this name, found first, must not take it away.
"""

from __future__ import annotations

from typing import Any

# Data is JSON, so that anything can enqueue and nothing that is read can run.
accept_content = ["json"]
task_serializer = "json"
result_serializer = "json"

# Nothing is lost: a message is acknowledged after its step has ended, and given back when its worker dies.
task_acks_late = True
task_reject_on_worker_lost = True
worker_prefetch_multiplier = 1
#: The same in every process on this Redis. A live worker keeps its own messages from being redelivered (see
#: `ferrum/worker.py`), so the time may be short.
broker_transport_options: dict[str, Any] = {
    "visibility_timeout": 30,
    "unacked_restore_interval": 5,
    "unacked_restore_throttle": 1,
    "max_connections": 500,
    # A list for each priority of a run, 0 first. Within one, ferrum's broker serves the queues in turn.
    "priority_steps": list(range(10)),
    # How long a connection may be silent before it is given up and made anew goes by `FERRUM_LEASE`.
    "socket_keepalive": True,
}
# Else what follows a join goes to the first list, ahead of all other runs.
task_inherit_parent_priority = True
# The default gives up after 0.6 s, which would fail a chord while Redis restarts. As long as the record's patience.
task_publish_retry_policy = {"max_retries": 600, "interval_start": 0.2, "interval_step": 0.2, "interval_max": 1}
result_backend_transport_options = {"retry_policy": task_publish_retry_policy}
result_backend_always_retry = True
broker_connection_retry_on_startup = True
broker_connection_max_retries = None
# Both hang or fail chords in Celery 5.7.
worker_cancel_long_running_tasks_on_connection_loss = False
worker_deduplicate_successful_tasks = False

# A chord whose member waits for a person for longer than this does not fire; the record then starts its join.
result_chord_expires = 7 * 86400
result_expires = 86400

# Threads that wait on one event loop: hundreds of model calls in one process.
worker_pool = "threads"
worker_concurrency = 64

# What costs and earns nothing here: the run record knows what runs. Flower turns task events on by itself.
task_track_started = False
task_ignore_result = True
worker_send_task_events = False

task_default_queue = "ferrum"

# `celery -A ferrum beat` starts the runs of `ferrum schedule`, beside what `beat_schedule` may say.
beat_scheduler = "ferrum.schedules:Beat"


def task_routes(name: str, *_: object, **__: object) -> dict[str, str] | None:
    """A queue for each step type, so that `-Q ferrum.llm` shapes a fleet."""
    return {"queue": ".".join(name.split(".")[:2])} if name.startswith("ferrum.") and name != "ferrum.run" else None
