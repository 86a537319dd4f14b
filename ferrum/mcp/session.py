"""One kept session with one MCP server.

Imports the MCP SDK, which takes half a second: the router imports this module when the first call needs it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import NoReturn, cast

from mcp import Client, MCPError
from mcp_types import (
    CONNECTION_CLOSED,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    REQUEST_TIMEOUT,
    CallToolResult,
    Implementation,
    RequestParamsMeta,
    TextContent,
    Tool,
)
from pydantic import JsonValue

from ferrum import schemas
from ferrum.errors import ToolError, did_you_mean
from ferrum.mcp.specs import IDEMPOTENCY_KEY, ServerSpec, ToolSpec
from ferrum.mcp.stdio import Wire
from ferrum.settings import redact

#: Answers that would be the same the next time.
_FINAL = frozenset({INVALID_PARAMS, INVALID_REQUEST, METHOD_NOT_FOUND})
#: A schema that cannot be used, or not on this value.
_UNTOLD = (schemas.SchemaFault, schemas.TooCostly)
#: No answer: nobody knows what became of the call.
_SILENCE = frozenset({CONNECTION_CLOSED, REQUEST_TIMEOUT})
_LONGEST_ERROR = 4000
_MOST_PAGES = 100
_OURSELVES = Implementation(name="ferrum", version="1")


class ConnectionLost(ToolError):
    """The server went away during a call; `retry` says whether it is safe to send the call again."""


class Session:
    """A server process and the one task that opened it, serves it and will close it.

    The SDK's client must be left in the task that entered it, so that task does nothing else; any task may call.
    """

    def __init__(self, name: str, spec: ServerSpec) -> None:
        self._name = name
        self._spec = spec
        self._over = asyncio.Event()
        self._ready = asyncio.Event()
        self._wire = Wire(spec, self._over.set, logging.getLogger(f"ferrum.mcp.{name}"))
        self._tools: dict[str, ToolSpec] = {}
        self._owner = asyncio.create_task(self._own(), name=f"mcp server {name}")

    @classmethod
    async def open(cls, name: str, spec: ServerSpec) -> Session:
        """A session that is ready for calls; `ToolError` with the server's last words when it did not start."""
        session = cls(name, spec)
        ready = asyncio.create_task(session._ready.wait())
        try:
            await asyncio.wait({ready, session._owner}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            session._owner.cancel()
            await asyncio.wait({session._owner})
            raise
        finally:
            ready.cancel()
        if not session._ready.is_set():
            session._owner.result()
        return session

    @property
    def alive(self) -> bool:
        return not self._over.is_set()

    async def tools(self) -> tuple[ToolSpec, ...]:
        """What the server has now."""
        try:
            async with asyncio.timeout(self._spec.timeout):
                self._tools = await _list_tools(self._client)
        except TimeoutError as error:
            raise ToolError(f"server {self._name!r} did not list its tools in time", retry=True) from error
        except MCPError as error:
            await self._gone(error, "it was asked for its tools", "", safe=True)
        return tuple(self._tools.values())

    async def call(self, tool: str, arguments: Mapping[str, JsonValue], key: str) -> JsonValue:
        """Call a tool and return its output.

        Raises `ToolError`. Its `retry` is true for a tool that answered with an error, unless the arguments are not
        what it asks for; and where no answer came only if the call surely never left or the tool is marked read-only
        or idempotent: else the effect may be there.
        """
        if not self.alive:
            # Its client knows no server any more, and says so in other words than of one that dies on it.
            await self._lost(None, f"it was running {tool!r}", "", safe=True)
        spec = self._tools.get(tool) or await self._find(tool)
        written = self._wire.written
        meta = cast(RequestParamsMeta, {IDEMPOTENCY_KEY: key})
        # A time limit ends with a word to the server, which a server that reads nothing would hold up.
        give_up = asyncio.get_running_loop().call_later(self._spec.timeout, self._give_up_if_stuck)
        try:
            async with asyncio.timeout(self._spec.timeout):
                result = await self._client.call_tool(tool, dict(arguments), meta=meta)
        except TimeoutError as error:
            self._fail(spec, f"no answer in {self._spec.timeout:g} s{_perhaps(spec)}", error, retry=spec.repeatable)
        except MCPError as error:
            if error.code in _SILENCE:
                unsent = self._wire.written == written
                doubt = "" if unsent else _perhaps(spec)
                await self._gone(error, f"it was running {tool!r}", doubt, safe=unsent or spec.repeatable)
            self._fail(spec, error.message, error, retry=error.code not in _FINAL)
        except (RuntimeError, ValueError) as error:
            # The SDK's own words for an answer that breaks the protocol or the tool's output schema.
            self._fail(spec, f"the answer is not valid{_perhaps(spec)}: {error}", error, retry=spec.repeatable)
        finally:
            give_up.cancel()
        if result.is_error:
            # Arguments that are not what the tool asks for are refused again.
            fitting = await asyncio.to_thread(_fits, arguments, spec.input_schema)
            self._fail(spec, _text(result) or "the tool failed and did not say why", retry=fitting)
        if wrong := await asyncio.to_thread(_wrong, result, spec):
            self._fail(spec, f"the answer is not valid{_perhaps(spec)}: {wrong}", retry=spec.repeatable)
        return _output(result, spec)

    async def close(self) -> None:
        """End the process and wait until it is gone."""
        self._over.set()
        await asyncio.wait({self._owner})
        if not self._owner.cancelled():
            self._owner.exception()

    async def _own(self) -> None:
        try:
            async with (
                asyncio.timeout(self._spec.start_timeout) as limit,
                Client(self._wire, cache=None, client_info=_OURSELVES) as self._client,
            ):
                self._client.session.validate_tool_result = _not_held  # type: ignore[method-assign]
                self._tools = await _list_tools(self._client)
                limit.reschedule(None)
                self._ready.set()
                await self._over.wait()
        except FileNotFoundError as error:
            raise ToolError(f"server {self._name!r} cannot be started: there is no {str(error.filename)!r}") from error
        except OSError as error:
            # A TimeoutError is an OSError too.
            why = f"not ready in {self._spec.start_timeout:g} s" if isinstance(error, TimeoutError) else str(error)
            raise self._not_started(why) from error
        except (MCPError, RuntimeError, ValueError, ExceptionGroup) as error:
            raise self._not_started(str(_first(error))) from error
        finally:
            self._over.set()

    def _not_started(self, why: str) -> ToolError:
        message = f"server {self._name!r} did not start: {why}{self._wire.last_words()}"
        return ToolError(self._clean(message), retry=True)

    async def _find(self, tool: str) -> ToolSpec:
        """A tool that was not there when the session was opened."""
        await self.tools()
        if tool not in self._tools:
            raise ToolError(f"server {self._name!r} has no tool {tool!r}{did_you_mean(tool, self._tools)}")
        return self._tools[tool]

    def _give_up_if_stuck(self) -> None:
        """End a session whose server reads nothing any more; one that is only slow stays."""
        if self._wire.stuck:
            self._over.set()

    async def _gone(self, error: MCPError, doing: str, doubt: str, *, safe: bool) -> NoReturn:
        if error.code != CONNECTION_CLOSED:
            message = f"server {self._name!r}: {error.message} while {doing}{doubt}"
            raise ToolError(self._clean(message), safe) from error
        await self._lost(error, doing, doubt, safe=safe)

    async def _lost(self, error: MCPError | None, doing: str, doubt: str, *, safe: bool) -> NoReturn:
        # The wire knows how the process ended once the owner has left.
        await self.close()
        message = f"server {self._name!r} went away while {doing}{doubt}{self._wire.last_words()}"
        raise ConnectionLost(self._clean(message), safe) from error

    def _fail(self, spec: ToolSpec, text: str, cause: Exception | None = None, *, retry: bool) -> NoReturn:
        raise ToolError(self._clean(f"{self._name}.{spec.name}: {text}"), retry) from cause

    def _clean(self, text: str) -> str:
        text = redact(text)
        return text if len(text) <= _LONGEST_ERROR else text[:_LONGEST_ERROR] + "…"


async def _list_tools(client: Client) -> dict[str, ToolSpec]:
    tools: dict[str, ToolSpec] = {}
    cursor: str | None = None
    for _ in range(_MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools |= {tool.name: _spec(tool) for tool in page.tools}
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


def _spec(tool: Tool) -> ToolSpec:
    hints = tool.annotations
    return ToolSpec(
        name=tool.name,
        description=tool.description or "",
        input_schema=tool.input_schema,
        output_schema=tool.output_schema,
        read_only=bool(hints and hints.read_only_hint),
        idempotent=bool(hints and hints.idempotent_hint),
    )


def _fits(arguments: Mapping[str, JsonValue], schema: Mapping[str, JsonValue]) -> bool:
    """Tell whether a tool may take these arguments; also where that cannot be told from its schema."""
    try:
        schemas.check(schema, lenient=True)
        return not schemas.errors(schema, dict(arguments), lenient=True)
    except _UNTOLD:
        return True


def _wrong(result: CallToolResult, spec: ToolSpec) -> str | None:
    """Say how a result breaks the schema that its tool promised, patterns that cannot be looked for left out."""
    if spec.output_schema is None:
        return None
    if result.structured_content is None:
        return "it has an output schema and gave nothing for it"
    try:
        schemas.check(spec.output_schema, lenient=True)
        found = schemas.worst(schemas.errors(spec.output_schema, result.structured_content, lenient=True))
    except schemas.TooCostly as error:
        return f"it cannot be held against the tool's output schema: {error}"
    except _UNTOLD as error:
        return f"the tool's output schema cannot be used: {error}"
    return None if found is None else f"it breaks the tool's output schema at {found.json_path}: {found.message}"


async def _not_held(name: str, result: CallToolResult) -> None:
    """In place of the SDK's own check of results, whose patterns and schemas may take for ever, on the loop of all."""


def _perhaps(spec: ToolSpec) -> str:
    return "" if spec.read_only else "; its effect may have happened"


def _output(result: CallToolResult, spec: ToolSpec) -> JsonValue:
    """The structured result where there is one, else the text, else every piece of content as a dict."""
    if result.structured_content is not None:
        structured: JsonValue = result.structured_content
        if isinstance(structured, dict) and set(structured) == {"result"} and _is_wrapped(spec):
            return structured["result"]
        return structured
    if all(isinstance(piece, TextContent) for piece in result.content):
        return _parsed(_text(result)) if result.content else None
    return [piece.model_dump(mode="json", by_alias=True, exclude_none=True) for piece in result.content]


def _is_wrapped(spec: ToolSpec) -> bool:
    """Whether the SDK made an object of a plain return value, as it does for lists, numbers and text."""
    schema = spec.output_schema or {}
    properties = schema.get("properties")
    if not isinstance(properties, dict) or set(properties) != {"result"}:
        return False
    return str(schema.get("title")).endswith("Output")


def _text(result: CallToolResult) -> str:
    return "\n".join(piece.text for piece in result.content if isinstance(piece, TextContent))


def _parsed(text: str) -> JsonValue:
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return cast(JsonValue, json.loads(text))
    except (RecursionError, ValueError):
        return text


def _first(error: Exception) -> Exception:
    """What is inside the groups that task groups make of one error."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
