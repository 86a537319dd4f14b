"""`type: tool`: one call of one tool of an MCP server."""

from __future__ import annotations

from typing import Any

from pydantic import Field, JsonValue, field_validator

from ferrum.governance.acts import ToolCall
from ferrum.steps import Attempt, Params, StepType
from ferrum.workflow import Retry


class ToolParams(Params):
    tool: str = Field(description="`server.tool`, as in `git.log`.")
    input: dict[str, Any] = Field({}, description="The tool's arguments.")

    @field_validator("tool")
    @classmethod
    def _is_two_names(cls, tool: str) -> str:
        server, _, name = tool.partition(".")
        if not server or not name:
            raise ValueError(f"{tool!r} is not a tool: write server.tool, as in git.log")
        return tool


class Tool(StepType[ToolParams]):
    name = "tool"
    params = ToolParams
    foreign = True
    retry = Retry(max_attempts=3)
    timeout_s = 120.0

    async def run(self, params: ToolParams, attempt: Attempt) -> JsonValue:
        server, _, tool = params.tool.partition(".")
        reply = await attempt.perform(ToolCall(server=server, tool=tool, arguments=params.input))
        return reply.output
