"""Every message goes out twice; imported by a worker (`FERRUM_IMPORTS`) or installed in a test's own process."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable
from typing import Any

from kombu.transport.redis import Channel

_once: Callable[..., None] = Channel._put


def _twice(channel: Channel, queue: str, message: dict[str, Any], **options: Any) -> None:
    again = copy.deepcopy(message)
    # A tag of its own: to the broker these are two messages, to Celery the same task.
    again["properties"]["delivery_tag"] = str(uuid.uuid4())
    _once(channel, queue, message, **options)
    _once(channel, queue, again, **options)


def install() -> None:
    Channel._put = _twice


def remove() -> None:
    Channel._put = _once
