"""Equality of JSON values as JSON Schema and CEL mean it: 1 and 1.0 are the same, 1 and true are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any, Final

#: Python's hashes of whole numbers repeat from 2**61 - 1 on: chosen ones would all fall into one place of a set.
_REPEATS: Final = 2**60


def key(value: Any, spend: Callable[[int], object] | None = None) -> Hashable:
    """A key that two JSON values share exactly if they are the same value.

    It takes time in proportion to the value, so that a set of keys finds doubles without comparing each with each.
    `spend` is told how many parts of the value are looked at, before they are, and may raise.
    """
    if isinstance(value, str):
        if spend is not None:
            spend(len(value) >> 6)
        return str(value)
    if isinstance(value, bool):
        return (bool, value)
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, list):
        if spend is not None:
            spend(len(value))
        return (list, *[key(item, spend) for item in value])
    if isinstance(value, dict):
        if spend is not None:
            spend(len(value))
        return (dict, frozenset([(name, key(item, spend)) for name, item in value.items()]))
    # Null, and the values that are CEL's own.
    return (type(value), value)


def _number(value: float) -> Hashable:
    if -_REPEATS < value < _REPEATS or (isinstance(value, float) and not math.isfinite(value)):
        return value
    return (int, hex(int(value)))
