"""What a sandbox is told to do, and what is believed of what it says back. Nothing here starts anything."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from resource import RLIM_INFINITY, getrlimit
from typing import Any

from pydantic import JsonValue

from ferrum.errors import SandboxError
from ferrum.governance.acts import CodeRun, WhyEnded
from ferrum.sandbox.init import LONGEST_PATH, matches
from ferrum.sandbox.runtimes import Runtime

#: Bytes of each stream that are kept, and at which a job is ended.
KEPT = 2**20
MOST_SAID = 64 * 2**20
#: Files that a job may give back, their bytes together, and how deep they may be.
MOST_FILES = 256
MOST_BYTES = 64 * 2**20
DEPTH = 16
#: Bytes of the file that holds its output, and lists and objects in each other there: few programs read 200 of them.
MOST_OUTPUT = 2 * 2**20
DEEPEST_OUTPUT = 100
#: What costs the kernel memory that is nobody's.
MOST_INODES = 20_000
MOST_SOCKETS = 256
MOST_LOCKS = 512
MOST_MAPPINGS = 100_000
MOST_OPEN = 128

# The module `resource` has the numbers of the host, which may be another system.
_CPU, _FSIZE, _CORE, _NPROC, _NOFILE, _MEMLOCK, _AS, _SIGPENDING, _MSGQUEUE = 0, 1, 4, 6, 7, 8, 9, 11, 12

_BLOCK = 4096
_LONGEST_NAME = 255
_LONGEST_ARGUMENT = 128 * 1024 - 1
_MOST_PATTERNS = 64
_MOST_DEEP = 3
#: What is said of a job that took longer than it may.
TOO_LONG = "it ran for longer than {:g} s"
#: A program that runs out of room says so last.
_NO_MEMORY = ("MemoryError", "Cannot allocate memory", "memory exhausted", "Out of memory")
_NO_DISK = ("No space left on device", "File too large", "[Errno 28]", "[Errno 27]")
#: Variables that change an interpreter or a loader as it starts.
_LOADERS = ("PYTHON", "LD_", "GLIBC_", "MALLOC_")


@dataclass(frozen=True, slots=True)
class Job:
    """One run, as PID 1 is told of it."""

    run: CodeRun
    files: Mapping[str, bytes]
    #: As PID 1 takes it.
    told: dict[str, Any]

    @classmethod
    def of(cls, run: CodeRun, files: Mapping[str, bytes], runtime: Runtime) -> Job:
        """Raises `SandboxError` for what cannot be."""
        _check_files(files, run.disk)
        _check_path(run.output_file, "output_file")
        if set("*?") & set(run.output_file):
            raise SandboxError(f"output_file: {run.output_file!r} is one file, without '*' and '?'")
        for pattern in run.outputs:
            _check_path(pattern, "outputs")
            if pattern.split("/").count("**") > _MOST_DEEP:
                raise SandboxError(f"outputs: {pattern!r} has more than {_MOST_DEEP} '**': name the directories")
        if len(run.outputs) > _MOST_PATTERNS:
            raise SandboxError(f"outputs: {len(run.outputs)} patterns are too many, {_MOST_PATTERNS} may be given")
        env = {"HOME": "/tmp", "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}  # noqa: S108
        env |= dict(runtime.env) | run.env
        for name, value in env.items():
            if not name or "=" in name or "\0" in name + value or not _is_unicode(name + value):
                raise SandboxError(f"env: {name!r} cannot be a variable of the environment")
        if not _is_unicode(run.code or ""):
            raise SandboxError("code: it holds half a character (a lone surrogate), which no file and no pipe can")
        programs, arguments = _command(run, runtime)
        told = {
            "programs": programs,
            "arguments": arguments,
            "code": run.code or "",
            "env": env,
            "limits": limits(run),
            "timeout": run.timeout_s,
            "memory": run.memory,
            "disk": run.disk,
            "processes": run.processes,
            "inodes": MOST_INODES,
            "sockets": MOST_SOCKETS,
            "locks": MOST_LOCKS,
            "mappings": MOST_MAPPINGS,
            "keep": KEPT,
            "most": MOST_SAID,
            "outputs": [*run.outputs, run.output_file],
            "most_files": MOST_FILES,
            "most_bytes": MOST_BYTES,
            "depth": DEPTH,
        }
        return cls(run, files, told)

    def wanted(self, path: str) -> bool:
        """Whether this is a path that was asked for, and one that is safe to write down."""
        if not _is_path(path) or path.count("/") >= DEPTH:
            return False
        return path == self.run.output_file or self._is_output(path)

    def given(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Of what came back, what is not only its output."""
        return {path: content for path, content in files.items() if self._is_output(path)}

    def output(self, files: Mapping[str, bytes]) -> tuple[bool, JsonValue, str]:
        """Whether it left an output, what that is, and what is wrong with what it left."""
        content = files.get(self.run.output_file)
        if content is None:
            return False, None, ""
        name = self.run.output_file
        if len(content) > MOST_OUTPUT:
            return False, None, f"{name}: more than {MOST_OUTPUT} bytes of JSON"
        try:
            value: JsonValue = json.loads(content)
            # Neither numbers without end nor halves of characters, which nobody could keep.
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:
            return False, None, f"{name}: it is not JSON: {str(error)[:200]}"
        if _is_deeper(value, DEEPEST_OUTPUT):
            return False, None, f"{name}: more than {DEEPEST_OUTPUT} lists and objects in each other"
        return True, value, ""

    def _is_output(self, path: str) -> bool:
        parts = tuple(path.split("/"))
        return any(matches(parts, tuple(pattern.split("/"))) for pattern in self.run.outputs)


def limits(run: CodeRun) -> dict[int, int]:
    """What the kernel holds each process to, by Linux's numbers of setrlimit(2)."""
    wanted = {
        # Not close: address space is also what is never used. The watchdog is the closer one.
        _AS: 2 * run.memory + 2**31,
        # PID 1 is one of them.
        _NPROC: run.processes + 1,
        _NOFILE: MOST_OPEN,
        _FSIZE: run.disk,
        # Not 0, which a core dump that goes to a program (systemd-coredump, apport) ignores: 1 is the kernel's word for
        # none at all. Else each crash would be written to a disk of the host's. `seccomp.py` keeps it so.
        _CORE: 1,
        _CPU: cpu_seconds(run),
        _MEMLOCK: 64 * 1024,
        _SIGPENDING: 256,
        _MSGQUEUE: 0,
    }
    return {limit: _may(limit, value) for limit, value in wanted.items()}


def _may(limit: int, wanted: int) -> int:
    """What is wanted, or the less that this process may have itself: nobody in a sandbox may raise that."""
    hard = getrlimit(limit)[1] if sys.platform == "linux" else RLIM_INFINITY
    return wanted if hard == RLIM_INFINITY else min(wanted, hard)


def cpu_seconds(run: CodeRun) -> int:
    """Seconds of processor time that one process may use."""
    return math.ceil(run.timeout_s * run.cpus)


def why(run: CodeRun, ended: Mapping[str, Any], last_words: str, no_memory: bool) -> tuple[WhyEnded, str]:
    """Why a job ended and a sentence about it.

    From what PID 1 said, the job's last words on stderr, and whether the kernel killed for memory.
    """
    exit_code, number = ended.get("exit"), ended.get("signal")
    if exit_code == 0:
        return WhyEnded.OK, ""
    for_what = ended.get("why")
    spent = number == signal.SIGKILL and float(ended.get("cpu") or 0) >= cpu_seconds(run) - 1
    reasons = {
        WhyEnded.MEMORY: (
            for_what == "memory" or no_memory or _says(last_words, _NO_MEMORY),
            f"it used more than its {_size(run.memory)} of memory",
        ),
        WhyEnded.OUTPUT: (for_what == "output", f"it wrote more than {_size(MOST_SAID)} to stdout or stderr"),
        WhyEnded.KILLED: (for_what == "processes", f"it had more than {run.processes} processes and threads"),
        WhyEnded.DISK: (
            for_what == "disk" or number == signal.SIGXFSZ or ended.get("full") or _says(last_words, _NO_DISK),
            f"its files needed more than {_size(run.disk)}, or were more than {MOST_INODES}",
        ),
        WhyEnded.TIMEOUT: (
            for_what == "timeout" or number == signal.SIGXCPU or spent,
            TOO_LONG.format(run.timeout_s)
            if for_what == "timeout"
            else f"it used more than {cpu_seconds(run)} s of processor time",
        ),
    }
    for reason, (holds, sentence) in reasons.items():
        if holds:
            return reason, sentence
    return WhyEnded.ERROR, f"it was ended by {signal_name(number)}" if number else f"it exited with {exit_code}"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _command(run: CodeRun, runtime: Runtime) -> tuple[list[str], list[str]]:
    """The programs to try, and their arguments; no program where PID 1's child runs Python as it is."""
    if (run.code is None) == (run.command is None):
        raise SandboxError("a run is either 'code' or 'command'")
    if run.command is not None:
        if not run.command or not run.command[0]:
            raise SandboxError("command: it names no program")
        programs, arguments = [run.command[0]], list(run.command[1:])
    elif run.language == "shell":
        programs, arguments = ["bash", "sh"], ["-c", run.code or ""]
    elif any(name.startswith(_LOADERS) for name in run.env):
        # They mean something to an interpreter as it starts, so this takes one of its own.
        programs, arguments = [runtime.interpreter], ["-c", run.code or ""]
    else:
        return [], []
    for text in (*programs, *arguments):
        if "\0" in text:
            raise SandboxError("a command holds no NUL")
        if not _is_unicode(text):
            raise SandboxError("a command holds no half of a character (a lone surrogate)")
        if len(text.encode()) > _LONGEST_ARGUMENT:
            raise SandboxError("a command is at most 128 KiB long: give the code as one of 'files' and run that")
    return programs, arguments


def _check_files(files: Mapping[str, bytes], disk: int) -> None:
    for path in files:
        _check_path(path, "files")
        above = [str(parent) for parent in PurePosixPath(path).parents if str(parent) in files]
        if above:
            raise SandboxError(f"files: {above[0]!r} is a file and cannot be the directory of {path!r}")
    # A file takes whole blocks, and what is left must be enough for the code to begin.
    if sum(-(-len(content) // _BLOCK) * _BLOCK for content in files.values()) > disk:
        raise SandboxError(f"files: they are bigger than its disk of {disk} bytes: give it more 'disk'")
    if len(files) > MOST_INODES // 4:
        raise SandboxError(f"files: {len(files)} are too many, {MOST_INODES // 4} may be given: put them in an archive")


def _check_path(path: str, where: str) -> None:
    if not _is_path(path):
        raise SandboxError(
            f"{where}: {path!r} is no path within the working directory: write it like 'data/table.csv', without "
            "'..' and without a '/' at its start"
        )


def _is_path(path: str) -> bool:
    """Whether it is relative, goes only down, and says what it is."""
    if not path.isprintable() or len(path) > LONGEST_PATH or path.startswith("/"):
        return False
    parts = path.split("/")
    return not {"", ".", ".."} & set(parts) and all(len(part.encode()) <= _LONGEST_NAME for part in parts)


def _is_unicode(text: str) -> bool:
    """Whether it can be written down: no half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_deeper(value: JsonValue, depth: int) -> bool:
    level: list[JsonValue] = [value]
    for _ in range(depth):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        ]
    return any(isinstance(one, dict | list) for one in level)


def _says(last_words: str, signs: tuple[str, ...]) -> bool:
    last = last_words.rstrip().rpartition("\n")[2]
    return any(sign in last for sign in signs)


def _size(size: int) -> str:
    return f"{size / 2**20:g} MiB"
