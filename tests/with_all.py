"""A module of a user's own that says what of it is for others; see `test_task_acts.py`."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree
from typing import Any

from flow_steps import words
from user_tasks import number_of

from ferrum.primitives import step

__all__ = ["Shop", "leave", "rmtree", "shop", "words"]


def leave(log: str) -> str:
    with Path(log).open("a") as file:
        file.write("left\n")
    return "left"


def unsaid(log: str) -> str:
    return leave(log)


def _private(log: str) -> str:
    return leave(log)


class Shop:
    @staticmethod
    def close(log: str) -> str:
        return leave(log)

    def open(self, log: str) -> str:
        return leave(log)


shop = Shop()
kept: Any = step(number_of)
