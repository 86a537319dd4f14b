"""Functions of a user's own, for flows; workers find them by `FERRUM_IMPORTS`."""

from __future__ import annotations

import os  # noqa: F401 - so that it can be asked for
from os import system  # noqa: F401 - the same
from pathlib import Path
from typing import Any, Literal

from celery import shared_task

from ferrum.primitives import step


@step
def fetch(url: str, tries: int = 3) -> str:
    return f"{url} after {tries}"


@step
async def summarise(text: str) -> str:
    return text.upper()


def classify(text: str) -> dict[str, Any]:
    return {"kind": "bug" if "bug" in text else "question"}


def merge(summary: str, kind: dict[str, Any]) -> str:
    return f"{summary}: {kind['kind']}"


def is_bug(text: str) -> bool:
    return "bug" in text


def words(text: str) -> list[str]:
    return text.split()


def twice(n: int) -> int:
    return n * 2


def enough(n: int) -> bool:
    return n > 20


def together(*parts: Any) -> list[Any]:
    return list(parts)


def add(a: int, /, b: int) -> int:
    return a + b


def nothing() -> str:
    return "nothing"


def wants(
    kind: Literal["a", "b"],
    many: list[int],
    how: dict[str, int],
    maybe: str | None = None,
    rate: float = 0.5,
    *,
    loud: bool = False,
    inner: object = object,
) -> list[Any]:
    return [kind, many, how, maybe, rate, loud, inner is object]


def book(log: str, what: str) -> dict[str, str]:
    return note(log, f"book {what}")


def cancel(booked: dict[str, str]) -> dict[str, str]:
    return note(booked["log"], booked["what"].replace("book", "cancel"))


def full(log: str) -> None:
    raise RuntimeError("full")


def note(log: str, what: str) -> dict[str, str]:
    with Path(log).open("a") as file:
        file.write(f"{what}\n")
    return {"log": log, "what": what}


@shared_task(name="flows.shout")
def shout(text: str) -> str:
    return f"{text}!"


class Kind:
    @staticmethod
    def static(n: int) -> int:
        return n
