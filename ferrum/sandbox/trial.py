"""A first program in a runtime that was just built, before it is used: in a sandbox, like all that follow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ferrum.errors import Unavailable
from ferrum.governance.acts import CodeRun, WhyEnded
from ferrum.sandbox.runs import Sandboxes
from ferrum.sandbox.runtimes import Runtime

#: Generous: the machine may be busy, and this is once.
_PATIENCE_S = 120.0
_MEMORY = 2 * 2**30


def trial(runtime: Runtime, program: str) -> Mapping[str, bytes]:
    """Run a program in a runtime and return what it left in `fonts`. Raises `Unavailable` where it fails.

    Where no sandbox works, as while an image is built, nothing is run: then there is nothing to return.
    """
    return asyncio.run(_trial(runtime, program))


async def _trial(runtime: Runtime, program: str) -> Mapping[str, bytes]:
    sandboxes = Sandboxes(warm=0, runtimes=lambda: (runtime,))
    try:
        if not any(probe.works for probe in await sandboxes.probe()):
            return {}
        run = CodeRun(
            runtime=runtime.name, code=program, outputs=("fonts/*.json",), timeout_s=_PATIENCE_S, memory=_MEMORY
        )
        reply = await sandboxes.run(run, {}, lambda stream, text: None)
    finally:
        await sandboxes.aclose()
    if reply.reason is not WhyEnded.OK:
        said = reply.stderr.strip().splitlines()[-1:] or [reply.detail]
        raise Unavailable(f"the runtime {runtime.name!r} was built and does not work in a sandbox: {said[0]}")
    return reply.files
