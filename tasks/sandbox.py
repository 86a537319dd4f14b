"""`type: sandbox`: code that nobody has read, run where it can do no harm."""

from __future__ import annotations

import asyncio
import json
import mimetypes
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, JsonValue, field_validator, model_validator

from ferrum.errors import StepError
from ferrum.governance.acts import CodeReply, CodeRun, InputFile, WhyEnded
from ferrum.steps import Attempt, Params, StepType

_MIB: Final = 2**20
_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": _MIB, "GIB": 2**30}
_SIZE: Final = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([KMG]?I?B)?", re.IGNORECASE)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


def _bytes(value: object) -> int:
    found = _SIZE.fullmatch(str(value).strip())
    if isinstance(value, bool) or not found or (found[2] or "").upper() not in _UNITS:
        raise ValueError('a size is a number of bytes, or a text like "64MB", "256MiB", "1.5GiB"')
    return int(float(found[1]) * _UNITS[(found[2] or "").upper()])


Size = Annotated[int, BeforeValidator(_bytes, json_schema_input_type=int | str)]


class SandboxParams(Params):
    language: Literal["python", "shell"] = Field("python", description="What `code` is written in.")
    code: str | None = Field(None, description="A program. Either this or `command`.")
    command: str | list[str] | None = Field(
        None, description="A line for the shell, or a program and its arguments, without a shell. Instead of `code`."
    )
    files: dict[str, JsonValue] = Field(
        {},
        description="What lies in its working directory, by path: text, a reference to an artifact "
        "(`{artifact: sha256:…}`, as other steps give it), or any other value, as JSON.",
    )
    outputs: list[str] = Field(
        [],
        description="Which files it gives back as artifacts: paths in its working directory; "
        "`*` and `?` stand for characters, `**` for folders.",
    )
    output_file: str = Field(
        "output.json", min_length=1, description="If it writes this file, the JSON in it is `output` of the result."
    )
    runtime: str = Field("python-basic", min_length=1, description="The prepared environment that it runs in.")
    memory: Size = Field(256 * _MIB, ge=16 * _MIB, description='At most; such as `"256MiB"`.')
    disk: Size = Field(64 * _MIB, ge=_MIB, description="What its files may take at any one time.")
    cpus: float = Field(1.0, gt=0, le=64, description="Cores, also a part of one.")
    processes: int = Field(32, ge=1, le=1000, description="Processes and threads at any one time.")
    env: dict[str, str] = Field({}, description="Its environment; nothing of the worker's is in it.")
    network: Literal["none"] = Field("none", description="It has none.")
    check: bool = Field(False, description="Whether the step fails where the code does not end well.")

    @model_validator(mode="after")
    def _has_one_program(self) -> SandboxParams:
        if (self.code is None) == (self.command is None):
            raise ValueError("give either code or a command")
        if self.command is not None and not self.command:
            raise ValueError("the command is empty")
        return self

    @field_validator("network", mode="before")
    @classmethod
    def _is_none(cls, network: object) -> object:
        if network != "none":
            raise ValueError(
                "the only network is 'none': no list of hosts can be held from inside of a sandbox. Fetch what the "
                "code needs in a step before it, and hand it over in 'files'"
            )
        return network

    def act(self, timeout_s: float) -> CodeRun:
        """What is decided on."""
        line = isinstance(self.command, str)
        return CodeRun(
            language="shell" if line else self.language,
            code=str(self.command) if line else self.code,
            command=tuple(self.command) if isinstance(self.command, list) else None,
            files={path: _file(value) for path, value in self.files.items()},
            outputs=tuple(self.outputs),
            timeout_s=timeout_s,
            **self.model_dump(
                include={"output_file", "runtime", "memory", "disk", "cpus", "processes", "env", "network"}
            ),
        )


class Sandbox(StepType[SandboxParams]):
    """Its output is what became of the code; see `docs/sandbox.md`."""

    name = "sandbox"
    params = SandboxParams
    foreign = True
    timeout_s = 60.0
    keeps_time = True

    async def run(self, params: SandboxParams, attempt: Attempt) -> JsonValue:
        assert attempt.timeout_s is not None
        reply = await attempt.perform(params.act(attempt.timeout_s))
        if params.check and reply.reason is not WhyEnded.OK:
            raise StepError("; ".join(("the code did not end well", *_why(reply))))
        return {**_result(reply), "files": await asyncio.to_thread(_kept, reply.files)}


def _why(reply: CodeReply) -> list[str]:
    """What there is to say of it, and its own last words."""
    said = reply.stderr.strip().splitlines()
    return [reply.detail or reply.reason.value, *said[-1:]]


def _file(value: JsonValue) -> InputFile:
    if isinstance(value, str):
        return InputFile(text=value)
    if isinstance(value, dict):
        digest = value.get("artifact", value.get("$artifact"))
        if isinstance(digest, str) and _DIGEST.fullmatch(digest):
            return InputFile(artifact=digest)
    return InputFile(text=json.dumps(value, ensure_ascii=False))


def _result(reply: CodeReply) -> dict[str, Any]:
    return {
        "reason": reply.reason.value,
        "detail": reply.detail,
        "exit_code": reply.exit_code,
        "signal": reply.signal,
        "stdout": reply.stdout,
        "stderr": reply.stderr,
        "output": reply.output,
        "cut": list(reply.cut),
        "wall_seconds": round(reply.wall_s, 4),
        "cpu_seconds": reply.cpu_s if reply.cpu_s is None else round(reply.cpu_s, 4),
        "peak_memory": reply.peak_memory,
        "backend": reply.backend,
        "memory_by": reply.memory_by,
    }


def _kept(files: Mapping[str, bytes]) -> dict[str, JsonValue]:
    """The files as artifacts, by path."""
    # Here and not above: who only plans a workflow needs no store.
    from ferrum.artifacts import process_artifacts

    kept: dict[str, JsonValue] = {}
    for path, data in files.items():
        media_type = mimetypes.guess_type(path, strict=False)[0] or "application/octet-stream"
        ref = process_artifacts().put(data, media_type)
        kept[path] = {"name": path, "artifact": ref.digest, "size": ref.size, "media_type": ref.media_type}
    return kept
