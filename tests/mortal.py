"""A worker that is killed by chance, each time that it sends Redis something or has sent it (`FERRUM_IMPORTS`).

One time in `$MORTAL`: a killed worker dies between two things that it does, and most of them are done in Redis.
"""

from __future__ import annotations

import os
import random
import signal
from typing import Any

from celery import signals
from redis.connection import AbstractConnection

_send = AbstractConnection.send_packed_command
_one_in = int(os.environ["MORTAL"])
_chance = random.Random(os.getpid())


def _perhaps_die() -> None:
    if _chance.randrange(_one_in) == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def _send_and_perhaps_die(self: Any, *arguments: Any, **options: Any) -> None:
    _perhaps_die()
    _send(self, *arguments, **options)
    _perhaps_die()


@signals.task_prerun.connect
def _begin(**_: object) -> None:
    """Not before it has something to do: a test waits until its workers are ready."""
    AbstractConnection.send_packed_command = _send_and_perhaps_die
