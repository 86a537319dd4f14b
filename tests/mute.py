"""For `FERRUM_IMPORTS`: the first messages that this worker wants to send after a step do not get out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from kombu.transport.redis import Channel

_put: Callable[..., None] = Channel._put
_number = itertools.count(1)


def _refuse_the_first(channel: Channel, queue: str, message: dict[str, Any], **options: Any) -> None:
    if queue.startswith("ferrum.") and next(_number) <= 2:
        raise ValueError("this message cannot be sent")
    _put(channel, queue, message, **options)


Channel._put = _refuse_the_first
