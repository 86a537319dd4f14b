"""The sandboxes of this machine, as the settings say."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from ferrum.errors import Unavailable
from ferrum.governance.acts import CodeRun, WhyEnded
from ferrum.sandbox import prepared
from ferrum.sandbox.runs import Sandboxes
from ferrum.sandbox.runtimes import Runtime
from ferrum.settings import Settings

#: Generous: the machine may be busy, and this is once.
_PATIENCE_S = 120.0
_MEMORY = 2 * 2**30


def sandboxes(settings: Settings) -> Sandboxes:
    """What runs code here.

    A runtime of ferrum's own is built when it is first asked for, where that needs no network.
    """
    tried = trial(settings)
    return Sandboxes.of(settings, find=lambda name: prepared.ready(name, settings, tried))


def trial(settings: Settings) -> prepared.Trial:
    """A first program in a runtime that was just built: in a sandbox, like all that follow.

    It raises `Unavailable` where that fails. Where no sandbox works, as while an image is built, nothing is run, and
    there is nothing to return.
    """
    return lambda runtime, program: asyncio.run(_trial(settings, runtime, program))


async def _trial(settings: Settings, runtime: Runtime, program: str) -> Mapping[str, bytes]:
    opened = Sandboxes.of(settings.model_copy(update={"sandbox_warm": 0}), find=lambda name: runtime)
    try:
        if not any(probe.works for probe in await opened.probe()):
            return {}
        run = CodeRun(
            runtime=runtime.name, code=program, outputs=("fonts/*.json",), timeout_s=_PATIENCE_S, memory=_MEMORY
        )
        reply = await opened.run(run, {}, lambda stream, text: None)
    finally:
        await opened.aclose()
    if reply.reason is not WhyEnded.OK:
        said = reply.stderr.strip().splitlines()[-1:] or [reply.detail]
        raise Unavailable(f"the runtime {runtime.name!r} was built and does not work in a sandbox: {said[0]}")
    return reply.files
