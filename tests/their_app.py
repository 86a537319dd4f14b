"""A Celery app of somebody else's, with tasks of its own, on the Redis that ferrum has too."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

app = Celery("theirs", broker=os.environ["THEIR_REDIS"], backend=os.environ["THEIR_REDIS"])


@app.task(name="theirs.long", acks_late=True)  # type: ignore[untyped-decorator]
def long(log: str, seconds: float) -> None:
    with Path(log).open("a", encoding="utf-8") as file:
        file.write("began\n")
    time.sleep(seconds)
