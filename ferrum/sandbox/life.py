"""One sandbox, as the host sees it: started, checked, given one job, ended."""

from __future__ import annotations

import asyncio
import codecs
import json
import marshal
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ferrum.errors import SandboxError
from ferrum.governance.acts import CodeReply, WhyEnded
from ferrum.sandbox import program, wire
from ferrum.sandbox.backend import Backend, Box, Cell, Missing
from ferrum.sandbox.job import MOST_BYTES, MOST_FILES, TOO_LONG, Job, signal_name, why
from ferrum.settings import redact

Say = Callable[[str, str], None]
"""Called with the name of a stream and a piece of what came through it."""

#: Bytes of each stream that are passed on as they come.
SHOWN = 64 * 2**10
#: How long a sandbox may take to be there, and to give back what its job left.
_START_S = 30.0
_COLLECT_S = 30.0
_LATE_S = 0.5
_CHUNK = 256 * 1024
_STREAMS = {wire.STDOUT: "stdout", wire.STDERR: "stderr"}


class Died(Exception):
    """PID 1 is gone."""


class Sandbox:
    """For one job. Whoever has it must `end` it."""

    def __init__(self, backend: Backend, box: Box, cell: Cell) -> None:
        self.box = box
        self._backend = backend
        self._cell = cell
        self._frames = wire.Frames()
        self._heard: list[tuple[bytes, bytes]] = []
        self._is_ready = False
        self._ended: asyncio.Future[None] | None = None
        for descriptor in (cell.stdin, cell.stdout):
            os.set_blocking(descriptor, False)

    @classmethod
    async def start(cls, backend: Backend, box: Box, thread: Executor, warm: bool = False) -> Sandbox:
        """One that is confined and checked. A `warm` one goes on to import what its runtime says; see `ready`.

        `thread` is the one that the backend lives in. Raises `Missing`, `Unconfined`, or `SandboxError` for one that
        did not come up.
        """
        starting = asyncio.get_running_loop().run_in_executor(thread, backend.start, box)
        try:
            cell = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # It cannot be called back, so it is ended as soon as it is there.
            starting.add_done_callback(_reap_started)
            raise
        sandbox = cls(backend, box, cell)
        try:
            async with asyncio.timeout(_START_S):
                await sandbox._send(program.program(box.runtime))
                await sandbox._expect(wire.UP)
                cell.confirm()
                runtime = box.runtime
                prepare = {
                    "warm": runtime.warm if warm else (),
                    "paths": runtime.paths,
                    "env": dict(runtime.env),
                    "links": runtime.links,
                    "apart": cell.apart,
                    "filter": cell.filter,
                }
                await sandbox._send(wire.frame(wire.PREPARE, marshal.dumps(prepare, 2)))
        except (Died, OSError, ValueError) as error:
            await sandbox.end()
            raise sandbox._not_started(error) from error
        except BaseException:
            await sandbox.end()
            raise
        return sandbox

    async def ready(self) -> None:
        """Wait until it has imported what it should. Raises `SandboxError` where it did not."""
        if self._is_ready:
            return
        try:
            async with asyncio.timeout(_START_S):
                missing = await self._expect(wire.READY)
        except (Died, OSError) as error:
            raise self._not_started(error) from error
        self._is_ready = True
        if missing:
            names = missing.decode(errors="replace").replace("\n", ", ")
            raise SandboxError(
                f"runtime {self.box.runtime.name!r} is damaged, it cannot import {names}: build it again"
            )

    @property
    def stdout(self) -> int:
        """Readable before a job was given only when PID 1 died."""
        return self._cell.stdout

    async def run(self, job: Job, say: Say) -> CodeReply:
        """Give it its job and wait for the end of that. Cancelled, it is killed at once."""
        begun = time.monotonic()
        heard = _Heard(say)
        try:
            reason, detail, ended = await self._until_it_ends(job, heard)
        except BaseException:
            self._cell.kill()
            raise
        wall = time.monotonic() - begun
        heard.close()
        code, number = ended.get("exit"), ended.get("signal")
        has_output, output, problem = job.output(heard.files)
        peak = self._cell.peak_memory()
        return CodeReply(
            reason=reason,
            detail=detail,
            exit_code=code,
            signal=None if number is None else signal_name(number),
            stdout=heard.text(wire.STDOUT),
            stderr=heard.text(wire.STDERR),
            has_output=has_output,
            output=output,
            files=job.given(heard.files),
            cut=tuple(heard.cut(ended, problem)),
            wall_s=wall,
            cpu_s=ended.get("cpu"),
            peak_memory=ended.get("peak") if peak is None else peak,
            backend=self._backend.kind.value,
            memory_by=self._cell.memory_by,
        )

    def kill(self) -> None:
        self._cell.kill()

    async def end(self) -> None:
        """Kill it and wait until nothing of it is left; may be called more than once."""
        if self._ended is None:
            self._cell.kill()
            for descriptor in (self._cell.stdin, self._cell.stdout):
                os.close(descriptor)
            self._ended = asyncio.get_running_loop().run_in_executor(None, self._cell.reap)
        await asyncio.shield(self._ended)

    async def _until_it_ends(self, job: Job, heard: _Heard) -> tuple[WhyEnded, str, dict[str, Any]]:
        run = job.run
        begun = False
        try:
            # PID 1 keeps the time, and says what was used until then; should it not, it is ended from here.
            async with asyncio.timeout(run.timeout_s + _LATE_S) as limit:
                await self._give(job)
                begun = True
                if not self._is_ready:
                    await self._expect(wire.READY)
                limit.reschedule(asyncio.get_running_loop().time() + run.timeout_s + _LATE_S)
                ended = await self._listen(heard)
                limit.reschedule(None)
            async with asyncio.timeout(_COLLECT_S):
                await self._collect(heard, job)
        except TimeoutError:
            self._cell.kill()
            with suppress(Died, OSError):
                # What it had said before it was killed, and is on its way.
                await self._listen(heard)
            return WhyEnded.TIMEOUT, TOO_LONG.format(run.timeout_s), {}
        except (Died, OSError) as error:
            if not begun:
                raise SandboxError(f"a sandbox died before its code began{self._words()}", retry=True) from error
            if self._cell.ran_out_of_memory():
                return WhyEnded.MEMORY, "the kernel killed it for its memory", {}
            return WhyEnded.KILLED, f"its sandbox died{self._words()}", {}
        reason, detail = why(run, ended, heard.text(wire.STDERR), self._cell.ran_out_of_memory())
        if reason is WhyEnded.OK and heard.too_much:
            return WhyEnded.OUTPUT, "it left more files than it may give back", ended
        return reason, detail, ended

    async def _give(self, job: Job) -> None:
        for path, content in job.files.items():
            await self._send(wire.frame(wire.FILE, path.encode()))
            for piece in wire.pieces(wire.DATA, content):
                await self._send(piece)
        for piece in wire.pieces(wire.JOB, marshal.dumps(job.told, 2)):
            await self._send(piece)
        await self._send(wire.frame(wire.JOB))

    async def _listen(self, heard: _Heard) -> dict[str, Any]:
        """What it says, to its end; returns how it ended."""
        while True:
            kind, body = await self._next()
            if kind in _STREAMS:
                heard.said(kind, body)
            elif kind == wire.END:
                return _checked(body)
            else:
                raise Died

    async def _collect(self, heard: _Heard, job: Job) -> None:
        while True:
            kind, body = await self._next()
            if kind == wire.FILE:
                heard.begin(body, job)
            elif kind == wire.DATA:
                heard.go_on(body)
            elif kind == wire.DONE:
                return heard.refused(body)
            else:
                raise Died

    async def _expect(self, kind: bytes) -> bytes:
        got, body = await self._next()
        if got != kind:
            raise Died
        return body

    async def _next(self) -> tuple[bytes, bytes]:
        """The next frame. Raises `Died` at the end and for what is no frame."""
        while not self._heard:
            try:
                data = os.read(self._cell.stdout, _CHUNK)
            except BlockingIOError:
                await _turn(self._cell.stdout, write=False)
                continue
            if not data:
                raise Died
            try:
                self._heard.extend(self._frames.feed(data))
            except wire.Broken as error:
                raise Died from error
        return self._heard.pop(0)

    async def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._cell.stdin, view) :]
            except BlockingIOError:
                await _turn(self._cell.stdin, write=True)

    def _not_started(self, error: Exception) -> Exception:
        words = self._cell.last_words()
        remedy = self._backend.explain(words)
        if remedy:
            return Missing(f"{self._backend.kind.value} does not work here: {remedy} (it said: {redact(words)[:300]})")
        how = "it was not ready in time" if isinstance(error, TimeoutError) else "it died"
        return SandboxError(f"a sandbox did not start: {how}{self._words()}", retry=True)

    def _words(self) -> str:
        words = self._cell.last_words()
        return f"; it last wrote: {redact(words)[:300]}" if words else ""


@dataclass
class _Heard:
    """What a job said and gave back so far; none of it is believed before it is checked."""

    say: Say
    files: dict[str, bytes] = field(default_factory=dict)
    too_much: bool = False

    def __post_init__(self) -> None:
        self._kept = {kind: bytearray() for kind in _STREAMS}
        self._shown = dict.fromkeys(_STREAMS, 0)
        self._decoders = {kind: codecs.getincrementaldecoder("utf-8")("replace") for kind in _STREAMS}
        self._refusals: list[str] = []
        self._file: bytearray | None = None
        self._bytes = 0

    def said(self, kind: bytes, body: bytes) -> None:
        kept = self._kept[kind]
        kept += body
        shown = body[: SHOWN - self._shown[kind]]
        self._shown[kind] += len(shown)
        text = self._decoders[kind].decode(shown)
        if text:
            self.say(_STREAMS[kind], text)

    def begin(self, name: bytes, job: Job) -> None:
        self._finish()
        path = name.decode(errors="replace")
        if len(self.files) >= MOST_FILES or path in self.files or not job.wanted(path):
            raise Died
        self._name, self._file = path, bytearray()

    def go_on(self, body: bytes) -> None:
        self._bytes += len(body)
        if self._file is None or self._bytes > MOST_BYTES:
            raise Died
        self._file += body

    def refused(self, body: bytes) -> None:
        self._finish()
        try:
            done = json.loads(body)
            self._refusals = [_printable(str(one)[:500]) for one in done["refused"][:100]]
            self.too_much = bool(done["too_much"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Died from error

    def close(self) -> None:
        """Say the rest of a character that never became one."""
        for kind, decoder in self._decoders.items():
            text = decoder.decode(b"", final=True)
            if text:
                self.say(_STREAMS[kind], text)

    def text(self, kind: bytes) -> str:
        return self._kept[kind].decode(errors="replace")

    def cut(self, ended: dict[str, Any], problem: str) -> list[str]:
        """What there was more of, and what was refused."""
        cut = [name for kind, name in _STREAMS.items() if ended.get(name, 0) > len(self._kept[kind])]
        files = ["files"] if self.too_much else []
        return [*cut, *files, *self._refusals, *([problem] if problem else [])]

    def _finish(self) -> None:
        if self._file is not None:
            self.files[self._name] = bytes(self._file)
        self._file = None


def _printable(text: str) -> str:
    """Names of files are anything, also what moves a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _checked(body: bytes) -> dict[str, Any]:
    """How a job ended; raises `Died` for what PID 1 of ours would never say."""
    try:
        ended = json.loads(body)
        known = {name: ended[name] for name in ("exit", "signal", "peak", "stdout", "stderr") if name in ended}
        if not all(type(value) is int and value >= 0 for value in known.values()):
            raise Died
        return {**known, "why": str(ended["why"]), "full": bool(ended["full"]), "cpu": float(ended["cpu"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Died from error


def _reap_started(starting: asyncio.Future[Cell]) -> None:
    if not starting.cancelled() and starting.exception() is None:
        cell = starting.result()
        for descriptor in (cell.stdin, cell.stdout):
            os.close(descriptor)
        cell.kill()
        asyncio.get_running_loop().run_in_executor(None, cell.reap)


Starter = Callable[[Box, bool], Awaitable[Sandbox]]
"""Starts a sandbox, a warm one or one whose job is there already."""


async def _turn(descriptor: int, *, write: bool) -> None:
    """Wait until something can be read or written."""
    loop = asyncio.get_running_loop()
    turn = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)

    def wake() -> None:
        if not turn.done():
            turn.set_result(None)

    add(descriptor, wake)
    try:
        await turn
    finally:
        remove(descriptor)
