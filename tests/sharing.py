"""What the tests of all that runs share have in common: time that a test moves by hand, and answers that get lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis

from ferrum.scripts import Who


class Clock:
    """A clock for a room; it stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


def connect(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, decode_responses=True)


def step(number: int) -> Who:
    return Who(f"run_{number:026}", "s")


def lose_an_answer(monkeypatch: pytest.MonkeyPatch, client: redis.Redis) -> None:
    """The next script that is run is done, but its answer does not arrive."""
    real: Callable[..., Any] = client.evalsha
    lost: list[Any] = []

    def lossy(*arguments: Any) -> Any:
        answer = real(*arguments)
        if not lost:
            lost.append(answer)
            raise redis.exceptions.ConnectionError("the answer was lost")
        return answer

    monkeypatch.setattr(client, "evalsha", lossy)
    monkeypatch.setattr("time.sleep", lambda _: None)
