"""Whether this machine can hold a sandbox; asked by running something in one."""

from __future__ import annotations

import asyncio
import os
from functools import cache
from typing import Literal

import pytest

from ferrum.sandbox import Kind, Sandboxes


@cache
def why_not(use: Kind | Literal["auto"] = "auto") -> str:
    """What is missing; empty where code can be run, by this backend or by any."""

    async def probed() -> str:
        sandboxes = Sandboxes(use, warm=0)
        try:
            probes = await sandboxes.probe()
        finally:
            await sandboxes.aclose()
        return "" if any(not probe.missing for probe in probes) else "; ".join(str(probe) for probe in probes)

    return asyncio.run(probed())


#: Skips where there is no sandbox, saying what is missing; fails where `FERRUM_REQUIRE_SANDBOX` says that there is one.
needs_sandbox = pytest.mark.skipif(
    not os.environ.get("FERRUM_REQUIRE_SANDBOX") and bool(why_not()), reason=f"NO SANDBOX IS TESTED: {why_not()}"
)
