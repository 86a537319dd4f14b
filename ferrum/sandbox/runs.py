"""What runs code for the actors: a backend that holds here, and a pool of sandboxes that wait for their job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from ferrum.errors import FerrumError, SandboxError
from ferrum.governance.acts import CodeReply, CodeRun
from ferrum.sandbox.backend import Backend, Box, Kind
from ferrum.sandbox.bubblewrap import Bubblewrap
from ferrum.sandbox.container import Container
from ferrum.sandbox.gvisor import GVisor
from ferrum.sandbox.job import Job
from ferrum.sandbox.life import Sandbox, Say
from ferrum.sandbox.pool import Pool
from ferrum.sandbox.probe import Probe, probe
from ferrum.sandbox.runtimes import BASIC, Runtime, basic
from ferrum.settings import Settings

#: In the order in which they are tried.
BACKENDS: Mapping[Kind, Callable[[], Backend]] = {
    Kind.BUBBLEWRAP: Bubblewrap,
    Kind.GVISOR: GVisor,
    Kind.CONTAINER: Container,
}

#: What did not work is tried again after so long: it may have been installed by then.
_AGAIN_S = 30.0
_STOPPING = "the sandboxes of this worker are closed: it is stopping"


class Sandboxes:
    """Runs code of strangers for one process, on one event loop.

    `use` is a backend's name, or `auto` for the first that holds here. There is no way to run code without one. `find`
    gives the runtimes that there are beside the standard library, by name; it may block, and raises a `FerrumError`.
    """

    def __init__(
        self,
        use: Kind | Literal["auto"] = "auto",
        *,
        warm: int = 2,
        idle_s: float = 60.0,
        find: Callable[[str], Runtime] | None = None,
        backends: Mapping[Kind, Callable[[], Backend]] = BACKENDS,
    ) -> None:
        self._kinds = [kind for kind in backends if use in ("auto", kind)]
        self._backends = backends
        self._find = find
        self._warm, self._idle_s = warm, idle_s
        self._opening = asyncio.Lock()
        self._open: _Open | None = None
        self._probes: tuple[Probe, ...] = ()
        self._tried = 0.0
        self._jobs: set[Sandbox] = set()
        self._closed = False

    @classmethod
    def of(cls, settings: Settings, find: Callable[[str], Runtime] | None = None) -> Sandboxes:
        """As the operator wants them."""
        use: Kind | Literal["auto"] = "auto" if settings.sandbox == "auto" else Kind(settings.sandbox)
        return cls(use, warm=settings.sandbox_warm, idle_s=settings.sandbox_idle, find=find)

    async def run(self, run: CodeRun, files: Mapping[str, bytes], say: Say) -> CodeReply:
        """Run code in a sandbox made for it, and return what it left.

        `files` are the contents of `run.files`, by path. `say` is called with the name of a stream and a piece of what
        came through it, as it comes, up to a cap. What the code does wrong is in the reply; `SandboxError` is raised
        for what cannot be run, and where there is no sandbox here. When the awaiting task is cancelled, all of it is
        killed at once.
        """
        runtime = await self._runtime(run.runtime)
        job = Job.of(run, files, runtime)
        opened = await self._opened()
        box = Box.of(run, runtime)
        sandbox = await opened.pool.take(box)
        self._jobs.add(sandbox)
        try:
            if self._closed:
                raise SandboxError(_STOPPING, retry=True)
            return await sandbox.run(job, say)
        finally:
            self._jobs.discard(sandbox)
            opened.end(sandbox)
            opened.pool.back(box)

    async def probe(self) -> tuple[Probe, ...]:
        """What came of trying each backend that may be used, up to the first that works; a worker calls it first."""
        async with self._opening:
            if self._open is None and not self._closed:
                await self._try_all()
            return self._probes

    async def prepare(self, run: CodeRun) -> None:
        """Have one ready for a run like this, if any may be kept ready; returns when it is on its way."""
        opened = await self._opened()
        opened.pool.expect(Box.of(run, await self._runtime(run.runtime)))

    async def aclose(self) -> None:
        """End every sandbox and wait until nothing is left of them; what runs is told `killed`."""
        self._closed = True
        async with self._opening:
            for sandbox in self._jobs:
                sandbox.kill()
            if self._open is not None:
                await self._open.close()
            self._open = None

    async def _runtime(self, name: str) -> Runtime:
        if self._find is None:
            if name == BASIC:
                return basic()
            raise SandboxError(f"there is no runtime {name!r} here, only {BASIC!r}")
        try:
            return await asyncio.to_thread(self._find, name)
        except FerrumError as error:
            raise SandboxError(str(error)) from error

    async def _opened(self) -> _Open:
        if self._closed:
            raise SandboxError(_STOPPING, retry=True)
        await self.probe()
        if self._open is None:
            raise SandboxError(self._why_not())
        return self._open

    async def _try_all(self) -> None:
        """Probe backends until one works; what did not work a moment ago does not now."""
        if self._probes and time.monotonic() - self._tried < _AGAIN_S:
            return
        probes = []
        for kind in self._kinds:
            opened = _Open(self._backends[kind](), self._warm, self._idle_s)
            result = await probe(opened.backend, opened.start, basic())
            probes.append(result)
            if result.works:
                self._open = opened
                break
            await opened.close()
        self._probes, self._tried = tuple(probes), time.monotonic()

    def _why_not(self) -> str:
        """What is missing, and what to type."""
        reasons = "; ".join(f"{probe.kind}: {probe.missing}" for probe in self._probes)
        return f"no sandbox can be had on this machine, and code never runs without one: {reasons}"


class _Open:
    """A backend in use: the thread it lives in, and its pool."""

    def __init__(self, backend: Backend, warm: int, idle_s: float) -> None:
        self.backend = backend
        self.pool = Pool(self.start, warm, idle_s)
        self._closed = False
        self._thread = ThreadPoolExecutor(1, f"ferrum-{backend.kind.value}")
        self._ending: set[asyncio.Task[None]] = set()

    async def start(self, box: Box, warm: bool) -> Sandbox:
        if self._closed:
            raise SandboxError(_STOPPING, retry=True)
        return await Sandbox.start(self.backend, box, self._thread, warm)

    def end(self, sandbox: Sandbox) -> None:
        """Nothing of it runs any more when this returns; the rest of it is cleared away behind the caller's back."""
        sandbox.kill()
        task = asyncio.ensure_future(sandbox.end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        self._closed = True
        await self.pool.close()
        while self._ending:
            await asyncio.wait(set(self._ending))
        await asyncio.get_running_loop().run_in_executor(self._thread, self.backend.close)
        self._thread.shutdown()
