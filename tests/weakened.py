"""Sandboxes with a defence taken out: how tests show that they would notice.

Only here. The product has no option, flag or setting that makes a sandbox weaker.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest

from ferrum.errors import FerrumError
from ferrum.governance.acts import CodeReply, CodeRun
from ferrum.sandbox import bubblewrap, program, seccomp
from ferrum.sandbox.backend import Backend, Box
from ferrum.sandbox.bubblewrap import Bubblewrap
from ferrum.sandbox.job import Job
from ferrum.sandbox.life import Sandbox, Say
from ferrum.sandbox.runtimes import Runtime, basic

_MACHINE = os.uname().machine


@dataclass(frozen=True)
class Without:
    """What is taken out of a sandbox."""

    #: Flags of bwrap.
    flags: tuple[str, ...] = ()
    #: Flags of bwrap, and what stands there instead.
    swap: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    #: System calls that are allowed.
    calls: tuple[str, ...] = ()
    #: The whole filter of system calls.
    filter: bool = False
    #: Lines of PID 1, and what stands there instead.
    lines: tuple[tuple[str, str], ...] = ()
    #: Limits that are not set, by number.
    limits: tuple[int, ...] = ()
    #: What PID 1 is told otherwise.
    told: tuple[tuple[str, int], ...] = ()
    #: What covers the telling files of /proc.
    covers: bool = False
    #: The limit of the wall clock.
    timeout: bool = False
    #: The size of what it may write to.
    sizes: bool = False
    #: What keeps terminals out of /dev.
    devices: bool = False
    #: bwrap gets the worker's environment.
    environment: bool = False
    #: The user that a root worker's sandboxes have.
    user: bool = False
    #: What was installed for the interpreter is seen.
    hidden: bool = False


class Weak(Bubblewrap):
    def __init__(self, without: Without) -> None:
        super().__init__(cgroups=None)
        self._without = without

    def arguments(self, box: Box, files: Any, info: int) -> list[str]:
        arguments = super().arguments(box, files, info)
        for flag in self._without.flags:
            arguments.remove(flag)
        for old, new in self._without.swap:
            at = next(
                (at for at in range(len(arguments)) if tuple(arguments[at : at + len(old)]) == old),
                None,
            )
            assert at is not None, f"bwrap is not given {old}"
            arguments[at : at + len(old)] = new
        return arguments

    def devices(self) -> list[str]:
        return ["--dev", "/dev"] if self._without.devices else super().devices()

    def writable(self, disk: int) -> list[str]:
        return super().writable(disk * 16 if self._without.sizes else disk)

    def filter(self, files: Any) -> list[str]:
        if self._without.filter:
            return []
        rules = seccomp.rules(_MACHINE)
        numbers = {name: number for number, name in seccomp.names(_MACHINE).items()} | {"clone3": 435}
        for name in self._without.calls:
            rules[numbers[name]] = [seccomp.Instruction(0x06, seccomp.ALLOW)]
        return ["--seccomp", str(files.hold(seccomp.assemble(_MACHINE, rules)))]


@contextmanager
def taken_out(without: Without) -> Iterator[None]:
    """Take out what is not in bwrap's flags, and the check from outside that would notice."""
    modules = program.sources()
    for old, new in without.lines:
        assert old in modules["ferrum.sandbox.init"], f"PID 1 has no {old!r}"
        modules["ferrum.sandbox.init"] = modules["ferrum.sandbox.init"].replace(old, new)
    with ExitStack() as patches:
        packed = program.packed(modules, with_sources=True)
        patches.enter_context(mock.patch.object(program, "program", return_value=packed))
        if without != Without():
            patches.enter_context(mock.patch.object(bubblewrap, "_unconfined", return_value=""))
        if without.covers:
            patches.enter_context(mock.patch.object(bubblewrap, "TELLING", ()))
        if without.user:
            patches.enter_context(mock.patch.object(bubblewrap, "borrowed", nullcontext))
        if without.environment:
            real = subprocess.Popen

            def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
                return real(*arguments, **{**options, "env": None})

            patches.enter_context(mock.patch.object(bubblewrap.subprocess, "Popen", popen))
        yield


def run(
    run: CodeRun,
    without: Without = Without(),
    files: Mapping[str, bytes] = {},
    say: Say = lambda stream, text: None,
) -> CodeReply:
    """Run code in a sandbox, without some of what it is made of."""
    return run_all([(run, files)], without, say)[0]


def run_all(
    runs: Sequence[tuple[CodeRun, Mapping[str, bytes]]],
    without: Without = Without(),
    say: Say = lambda stream, text: None,
) -> list[CodeReply]:
    """Run several, side by side."""
    runtime = replace(basic(), hidden=()) if without.hidden else basic()
    if without.timeout:
        runs = [(run.model_copy(update={"timeout_s": 60.0}), files) for run, files in runs]
    jobs = [Job.of(run, files, runtime) for run, files in runs]
    for job in jobs:
        for limit in without.limits:
            del job.told["limits"][limit]
        if "--unshare-net" in without.flags:
            # It would count those of the whole machine, which may have more.
            job.told["sockets"] = 1 << 30
        job.told.update(dict(without.told))
    with taken_out(without):
        return asyncio.run(_run_all(Weak(without), runtime, jobs, say))


def run_with(backend: Backend, run: CodeRun) -> CodeReply:
    """Run code with another backend."""
    return asyncio.run(_run_all(backend, basic(), [Job.of(run, {}, basic())], lambda stream, text: None))[0]


async def _run_all(backend: Backend, runtime: Runtime, jobs: list[Job], say: Say) -> list[CodeReply]:
    with ThreadPoolExecutor(1) as thread:
        return await asyncio.gather(*(_run(backend, Box.of(job.run, runtime), job, thread, say) for job in jobs))


async def _run(backend: Backend, box: Box, job: Job, thread: ThreadPoolExecutor, say: Say) -> CodeReply:
    sandbox = await Sandbox.start(backend, box, thread)
    try:
        return await sandbox.run(job, say)
    finally:
        await sandbox.end()


def needed() -> None:
    """Skip, or fail where sandboxes are required, on a machine that has no bubblewrap."""
    try:
        Bubblewrap().check()
        run(CodeRun(code="pass"))
    except FerrumError as error:
        if os.environ.get("FERRUM_REQUIRE_SANDBOX"):
            pytest.fail(f"FERRUM_REQUIRE_SANDBOX is set, and there is no sandbox here: {error}")
        pytest.skip(f"NO SANDBOX IS TESTED HERE: {error}")
