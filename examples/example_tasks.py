"""The Celery tasks that the examples run: a small shop that needs nothing but this file.

export FERRUM_IMPORTS=example_tasks PYTHONPATH=examples FERRUM_POLICY=examples/ferrum.policy.yaml
celery -A ferrum worker
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from celery import shared_task

_ORDERS: Final[dict[str, dict[str, Any]]] = {
    "A1": {"items": ["tea", "milk", "honey"], "country": "DE", "total": 12},
    "B2": {"items": ["teapot"], "country": "JP", "total": 80},
    "C3": {"items": ["tea", "unicorn"], "country": "US", "total": 9},
}
_WEIGHTS: Final = {"tea": 1, "milk": 3, "honey": 2, "teapot": 7}

#: How often `shop.post` was called for each order, in this process.
_posted: Counter[str] = Counter()


@shared_task(name="shop.order")
def order(id: str) -> dict[str, Any]:
    if id not in _ORDERS:
        raise ValueError(f"there is no order {id}")
    return {"id": id, **_ORDERS[id]}


@shared_task(name="shop.weigh")
def weigh(item: str) -> int:
    if item not in _WEIGHTS:
        raise ValueError(f"nobody knows what a {item} weighs")
    return _WEIGHTS[item]


@shared_task(name="shop.write")
def write(text: str) -> str:
    """Stands for whatever a real shop would do here."""
    return text


@shared_task(name="shop.fill")
def fill(box: list[str], item: str, number: int) -> list[str]:
    """The box with this item in it once more, where it weighs less than all that may come."""
    return [*box, f"{item} {number}"]


@shared_task(name="shop.post")
def post(id: str) -> str:
    """Fails the first time it is called for an order, as a carrier's API may."""
    _posted[id] += 1
    if _posted[id] == 1:
        raise ConnectionError("the carrier does not answer")
    return f"{id}-0001"


@shared_task(name="shop.broken")
def broken(reason: str) -> None:
    raise RuntimeError(reason)
