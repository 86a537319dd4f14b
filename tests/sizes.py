"""How large the long suites are: a fair sample in `make test`, all of it in `make test-all` and CI."""

from __future__ import annotations

import os

#: 1 is the sample.
SIZE = float(os.environ.get("FERRUM_TEST_SIZE", "1"))


def sized(sample: int) -> int:
    """So many cases as `FERRUM_TEST_SIZE` asks for, where the sample has `sample`."""
    return max(1, round(sample * SIZE))
