"""Tools behind MCP servers, with real servers as child processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fleet import PATIENCE_S
from preloading import forked
from pydantic import JsonValue

from ferrum import schemas
from ferrum.errors import ToolError
from ferrum.governance.acts import ToolCall
from ferrum.mcp.router import Router
from ferrum.mcp.specs import ServerSpec, load_servers
from ferrum.settings import Settings

# What imports the MCP SDK is imported by the tests: each process of xdist collects this file, and one runs it.

_ROOT = Path(__file__).parent.parent

#: A server whose tools leave marks in the directory `marks`, which is its working directory.
_ODD_SERVER = """
import asyncio, os, sys
from pathlib import Path
from mcp.server.mcpserver import MCPServer
from mcp_types import EmbeddedResource, ImageContent, TextContent, TextResourceContents, ToolAnnotations

with open("starts", "a") as starts:
    starts.write(f"{os.getpid()}\\n")
app = MCPServer("odd", log_level="WARNING")

def dies_at_first():
    with open("calls", "a") as calls:
        calls.write("call\\n")
    if len(Path("calls").read_text().splitlines()) == 1:
        print("a last word of", os.environ.get("PAT"), file=sys.stderr, flush=True)
        os._exit(7)
    return "well"

@app.tool(annotations=ToolAnnotations(read_only_hint=True))
async def read_only() -> str:
    return dies_at_first()

@app.tool(annotations=ToolAnnotations(idempotent_hint=True))
async def idempotent() -> str:
    return dies_at_first()

@app.tool()
async def effect() -> str:
    return dies_at_first()

@app.tool()
async def wait_for_ever() -> None:
    Path("waiting").touch()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        Path("cancelled").touch()
        raise

@app.tool(structured_output=False)
async def text(text: str) -> list[TextContent]:
    return [TextContent(type="text", text=part) for part in text.split("|")]

@app.tool(structured_output=False)
async def picture() -> list[TextContent | ImageContent]:
    return [TextContent(type="text", text="look"), ImageContent(type="image", data="AA==", mime_type="image/png")]

@app.tool()
async def leak() -> str:
    raise app_error("the key is " + os.environ["PAT"])

from mcp.server.mcpserver.exceptions import ToolError as app_error

@app.tool()
async def grow() -> str:
    async def later() -> str:
        return "grown"
    app.add_tool(later, name="later")
    return "yes"

app.run("stdio")
"""


#: A server that says one thing and gives another.
_LIAR = """
import asyncio
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp_types import CallToolResult, ListToolsResult, TextContent, Tool

def schema(text):
    return {"type": "object", "properties": {"text": text}, "required": ["text"]}

TOOLS = {
    "slow": (schema({"pattern": "^(a|a)*$"}), {"text": "a" * 5000 + "b"}),
    "fitting": (schema({"pattern": "^(a|a)*$"}), {"text": "a" * 5000}),
    "ahead": (schema({"pattern": "(?=a)"}), {"text": "b"}),
    "doubled": (
        {"$defs": {"d0": False, **{f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n - 1}"}] * 2} for n in range(1, 60)}},
         "type": "object", "properties": {"text": {"$ref": "#/$defs/d59"}}},
        {"text": "x"},
    ),
    "nothing": (schema({}), None),
    "broken": (schema({"pattern": 5}), {"text": "x"}),
}

async def tools(context, params):
    return ListToolsResult(
        tools=[Tool(name=name, input_schema={"type": "object"}, output_schema=of) for name, (of, _) in TOOLS.items()]
    )

async def call(context, params):
    given = TOOLS[params.name][1]
    content = [TextContent(type="text", text="[" * 100_000)]
    if given is None:
        return CallToolResult(content=content)
    return CallToolResult(content=content, structured_content=given)

async def main():
    server = Server("liar", on_list_tools=tools, on_call_tool=call)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())

asyncio.run(main())
"""


def _effects(log: Path, *, env: Mapping[str, str] | None = None) -> ServerSpec:
    server = {"module": "ferrum.testing.effects_server", "args": ["--log", str(log)]}
    environ = dict(forked() if env is None else env)
    return load_servers(Settings(mcp_servers=json.dumps({"fx": {**server, "env": environ}})), {})["fx"]


def _odd(directory: Path) -> ServerSpec:
    script = directory / "odd_server.py"
    script.write_text(_ODD_SERVER)
    return ServerSpec("python", (str(script),), cwd=directory, env=forked(script.name))


@asynccontextmanager
async def _router(**servers: ServerSpec) -> AsyncIterator[Router]:
    router = Router(servers)
    try:
        yield router
    finally:
        await router.aclose()


async def _call(router: Router, target: str, key: str = "key", /, **arguments: JsonValue) -> JsonValue:
    server, _, tool = target.partition(".")
    return (await router.call(ToolCall(server=server, tool=tool, arguments=arguments), key)).output


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_tool_is_called_and_its_effect_carries_the_idempotency_key(tmp_path: Path) -> None:
    async def story() -> None:
        async with _router(fx=_effects(tmp_path / "log")) as router:
            assert await _call(router, "fx.append", "run_1/step", text="one") == {"written": "one"}
            await _call(router, "fx.append", "run_2/step", text="two")

    asyncio.run(story())
    assert (tmp_path / "log").read_text() == "run_1/step\tone\nrun_2/step\ttwo\n"


def test_a_structured_result_comes_back_as_the_tool_returned_it(tmp_path: Path) -> None:
    values: list[JsonValue] = [1, "x", None, [1, [2]], {"a": {"b": None}}, {"result": 1}]

    async def story() -> list[JsonValue]:
        async with _router(fx=_effects(tmp_path / "log")) as router:
            return [await _call(router, "fx.echo", value=value) for value in values]

    assert asyncio.run(story()) == values


def test_text_is_joined_and_parsed_where_it_is_json_and_other_content_comes_as_it_is(tmp_path: Path) -> None:
    async def story() -> None:
        async with _router(odd=_odd(tmp_path)) as router:
            assert await _call(router, "odd.text", text="a|b") == "a\nb"
            assert await _call(router, "odd.text", text='{"a":| 1}') == {"a": 1}
            assert await _call(router, "odd.text", text="[no json]") == "[no json]"
            assert await _call(router, "odd.text", text="12") == "12"
            assert await _call(router, "odd.picture") == [
                {"type": "text", "text": "look"},
                {"type": "image", "data": "AA==", "mimeType": "image/png"},
            ]

    asyncio.run(story())


def test_a_result_is_held_against_its_tools_schema_in_linear_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It would be five seconds.
    monkeypatch.setattr(schemas, "MAX_WORK", 500_000)
    script = tmp_path / "liar.py"
    script.write_text(_LIAR)

    async def refused(router: Router, tool: str) -> str:
        with pytest.raises(ToolError) as caught:
            await _call(router, f"liar.{tool}")
        return str(caught.value)

    async def story() -> None:
        async with _router(liar=ServerSpec("python", (str(script),), cwd=tmp_path, env=forked(script.name))) as router:
            assert "breaks the tool's output schema at $.text" in await refused(router, "slow")
            assert await _call(router, "liar.fitting") == {"text": "a" * 5000}
            # A pattern that cannot be looked for in linear time is the server's own matter.
            assert await _call(router, "liar.ahead") == {"text": "b"}
            assert "cannot be held against the tool's output schema: it would take" in await refused(router, "doubled")
            assert "it has an output schema and gave nothing for it" in await refused(router, "nothing")
            assert "the tool's output schema cannot be used" in await refused(router, "broken")

    asyncio.run(story())


def test_text_that_is_no_json_to_the_end_is_text() -> None:
    from ferrum.mcp.session import _parsed

    assert _parsed("[" * 100_000) == "[" * 100_000


def test_calls_at_the_same_time_share_one_start_of_the_server(tmp_path: Path) -> None:
    async def story() -> None:
        async with _router(odd=_odd(tmp_path)) as router:
            outputs = await asyncio.gather(*(_call(router, "odd.text", text=f"t{n}") for n in range(20)))
            assert outputs == [f"t{n}" for n in range(20)]

    asyncio.run(story())
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_tools_are_listed_with_schema_and_hints(tmp_path: Path) -> None:
    async def story() -> None:
        async with _router(fx=_effects(tmp_path / "log")) as router:
            tools = {tool.name: tool for tool in await router.tools("fx")}
            assert set(tools) == {"append", "sleep", "fail", "die", "environment", "echo"}
            assert tools["echo"].read_only
            assert tools["echo"].repeatable
            assert not tools["append"].repeatable
            assert tools["fail"].input_schema["required"] == ["message"]
            assert tools["fail"].description == "Fail with this message."

    asyncio.run(story())


def test_a_tool_that_appears_later_is_found(tmp_path: Path) -> None:
    async def story() -> None:
        async with _router(odd=_odd(tmp_path)) as router:
            await _call(router, "odd.grow")
            assert await _call(router, "odd.later") == "grown"

    asyncio.run(story())


def test_an_error_of_a_tool_is_a_tool_error_that_may_be_tried_again(tmp_path: Path) -> None:
    async def story() -> ToolError:
        async with _router(fx=_effects(tmp_path / "log")) as router:
            with pytest.raises(ToolError, match=r"^fx.fail: .*no such branch$") as caught:
                await _call(router, "fx.fail", message="no such branch")
            return caught.value

    assert asyncio.run(story()).retry


def test_arguments_that_are_not_what_a_tool_asks_for_are_refused_once_and_for_all(tmp_path: Path) -> None:
    async def story() -> ToolError:
        async with _router(fx=_effects(tmp_path / "log")) as router:
            with pytest.raises(ToolError, match=r"^fx.append: .*\n?text\n.*Field required") as caught:
                await _call(router, "fx.append", txt="x")
            return caught.value

    assert not asyncio.run(story()).retry


@pytest.mark.parametrize(
    "schema",
    [{"type": "strin"}, {"$ref": "https://nowhere.invalid/schema"}, {"properties": {"text": {"pattern": "("}}}, {}],
)
def test_a_schema_that_says_nothing_refuses_nothing(schema: dict[str, JsonValue]) -> None:
    from ferrum.mcp.session import _fits

    assert _fits({"text": "x"}, schema)


def test_an_unknown_server_and_an_unknown_tool_are_refused_with_what_there_is(tmp_path: Path) -> None:
    async def story() -> None:
        async with _router(fx=_effects(tmp_path / "log")) as router:
            with pytest.raises(ToolError, match="no MCP server 'git' \\(there is: fx\\)"):
                await _call(router, "git.log")
            with pytest.raises(ToolError, match="server 'fx' has no tool 'apend' \\(did you mean 'append'\\?\\)"):
                await _call(router, "fx.apend")

    asyncio.run(story())


@pytest.mark.parametrize("tool", ["read_only", "idempotent"])
def test_a_call_lost_with_its_server_is_sent_again_where_that_is_safe(tmp_path: Path, tool: str) -> None:
    async def story() -> JsonValue:
        async with _router(odd=_odd(tmp_path)) as router:
            return await _call(router, f"odd.{tool}")

    assert asyncio.run(story()) == "well"
    assert len((tmp_path / "starts").read_text().splitlines()) == 2


def test_a_lost_call_with_an_effect_is_not_sent_again_and_the_next_one_finds_a_new_server(tmp_path: Path) -> None:
    async def story() -> ToolError:
        async with _router(odd=_odd(tmp_path)) as router:
            with pytest.raises(ToolError) as caught:
                await _call(router, "odd.effect")
            assert (tmp_path / "calls").read_text() == "call\n"
            assert await _call(router, "odd.effect") == "well"
            return caught.value

    error = asyncio.run(story())
    assert not error.retry
    assert str(error) == (
        "server 'odd' went away while it was running 'effect'; its effect may have happened; exit status 7; "
        "it last wrote: a last word of None"
    )


def test_a_server_that_died_meanwhile_is_started_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with _router(odd=_odd(tmp_path)) as router:
            await _call(router, "odd.text", text="x")
            os.kill(int((tmp_path / "starts").read_text()), signal.SIGKILL)
            assert await router.tools("odd")
            assert await _call(router, "odd.text", text="x") == "x"

    asyncio.run(story())


def test_a_call_that_surely_never_left_may_be_sent_again_whatever_the_tool_does(tmp_path: Path) -> None:
    from ferrum.mcp.session import ConnectionLost, Session

    async def story() -> ToolError:
        session = await Session.open("odd", _odd(tmp_path))
        os.kill(int((tmp_path / "starts").read_text()), signal.SIGKILL)
        await _until(lambda: not session.alive)
        with pytest.raises(ConnectionLost) as caught:
            await session.call("effect", {}, "key")
        await session.close()
        return caught.value

    error = asyncio.run(story())
    assert error.retry
    assert str(error) == "server 'odd' went away while it was running 'effect'; SIGKILL"


def test_a_call_that_takes_too_long_fails_and_the_session_stays_good(tmp_path: Path) -> None:
    async def story() -> None:
        async with _router(odd=replace(_odd(tmp_path), timeout=0.5)) as router:
            with pytest.raises(ToolError, match=r"no answer in 0\.5 s; its effect may have happened") as caught:
                await _call(router, "odd.wait_for_ever")
            assert not caught.value.retry
            await _until((tmp_path / "cancelled").exists)
            assert await _call(router, "odd.text", text="x") == "x"

    asyncio.run(story())
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_cancelling_a_call_tells_the_server_and_leaves_the_session_good(tmp_path: Path) -> None:
    async def story() -> None:
        async with _router(odd=_odd(tmp_path)) as router:
            call = asyncio.create_task(_call(router, "odd.wait_for_ever"))
            await _until((tmp_path / "waiting").exists)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await _until((tmp_path / "cancelled").exists)
            assert await _call(router, "odd.text", text="x") == "x"

    asyncio.run(story())
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_a_caller_that_gives_up_during_a_start_does_not_take_it_from_the_others(tmp_path: Path) -> None:
    async def story() -> None:
        async with _router(odd=_odd(tmp_path)) as router:
            impatient = asyncio.create_task(_call(router, "odd.text", text="x"))
            patient = asyncio.create_task(_call(router, "odd.text", text="y"))
            await _until((tmp_path / "starts").exists)
            impatient.cancel()
            assert await patient == "y"

    asyncio.run(story())
    assert len((tmp_path / "starts").read_text().splitlines()) == 1


def test_a_server_gets_path_and_what_its_spec_says_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")

    async def story() -> JsonValue:
        spec = _effects(tmp_path / "log", env={})
        async with _router(fx=replace(spec, env={**spec.env, "LC_ALL": "C.UTF-8", "MINE": "1"})) as router:
            return await _call(router, "fx.environment")

    # PYTHONPATH is how a module of a ferrum that is not installed is found.
    assert set(json.loads(json.dumps(asyncio.run(story())))) - {"PYTHONPATH"} == {"LC_ALL", "MINE", "PATH"}


def test_a_secret_of_a_spec_is_blanked_in_errors(tmp_path: Path) -> None:
    async def story() -> ToolError:
        secret = "hunter2hunter2"
        spec = replace(_odd(tmp_path), env={"PAT": secret}, secrets=(secret,))
        async with _router(odd=spec) as router:
            with pytest.raises(ToolError) as caught:
                await _call(router, "odd.leak")
            with pytest.raises(ToolError) as lost:
                await _call(router, "odd.effect")
            assert str(lost.value).endswith("a last word of ***")
            return caught.value

    assert str(asyncio.run(story())).endswith("the key is ***")


@pytest.mark.parametrize(
    ("spec", "said", "retry"),
    [
        (
            ServerSpec("python", ("-c", "import sys; print('hello'); sys.exit('no such database')")),
            r"server 'bad' did not start: Connection closed; exit status 1; it last wrote: .*no such database",
            True,
        ),
        (ServerSpec("no-such-program"), "server 'bad' cannot be started: there is no 'no-such-program'", False),
        (
            ServerSpec("python", ("-c", "pass"), cwd=Path("/no/such/place")),
            "server 'bad' cannot be started: there is no '/no/such/place'",
            False,
        ),
        (
            ServerSpec("python", ("-c", "import sys; sys.stdin.read()"), start_timeout=0.3),
            "server 'bad' did not start: not ready in 0.3 s",
            True,
        ),
        (ServerSpec("python", ("-c", "print('[]'); input(); print('x')")), "did not start", True),
    ],
)
def test_a_server_that_does_not_start_is_an_error_with_its_last_words(spec: ServerSpec, said: str, retry: bool) -> None:
    async def story() -> ToolError:
        async with _router(bad=spec) as router:
            with pytest.raises(ToolError, match=said) as caught:
                await _call(router, "bad.any")
            return caught.value

    assert asyncio.run(story()).retry is retry


def test_a_server_that_reads_nothing_is_replaced_once_it_blocks_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ferrum.mcp.stdio._GRACE", 0.1)
    frozen = "@app.tool()\nasync def freeze() -> None:\n    os.kill(os.getpid(), 19)\n\napp.run("
    (tmp_path / "freezing.py").write_text(_ODD_SERVER.replace("app.run(", frozen))

    async def story() -> None:
        spec = ServerSpec("python", ("freezing.py",), cwd=tmp_path, timeout=1)
        async with _router(odd=spec) as router:
            with pytest.raises(ToolError, match="no answer in 1 s"):
                await _call(router, "odd.freeze")
            begun = time.monotonic()
            with pytest.raises(ToolError, match="no answer in 1 s"):
                await _call(router, "odd.text", text="x" * 500_000)
            assert time.monotonic() - begun < 4
            assert await _call(router, "odd.text", text="x") == "x"

    asyncio.run(story())


def test_closing_ends_every_server_and_every_later_call(tmp_path: Path) -> None:
    async def story() -> None:
        async with _router(odd=_odd(tmp_path)) as router:
            waiting = asyncio.create_task(_call(router, "odd.wait_for_ever"))
            await _until((tmp_path / "waiting").exists)
        with pytest.raises(ToolError, match="went away") as caught:
            await waiting
        assert not caught.value.retry
        with pytest.raises(ToolError, match="the MCP router is closed"):
            await _call(router, "odd.text", text="x")

    asyncio.run(story())
    assert not _alive(int((tmp_path / "starts").read_text()))


def test_closing_during_a_start_ends_the_start(tmp_path: Path) -> None:
    async def story() -> None:
        async with _router(odd=_odd(tmp_path)) as router:
            call = asyncio.create_task(_call(router, "odd.text", text="x"))
            await _until((tmp_path / "starts").exists)
        with pytest.raises(ToolError, match="the MCP router is closed"):
            await call

    asyncio.run(story())
    assert not _alive(int((tmp_path / "starts").read_text()))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_servers_leave_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path / "repository"], check=True)
    script = textwrap.dedent(
        f"""
        import asyncio, json
        from ferrum.governance.acts import ToolCall
        from ferrum.mcp.router import Router
        from ferrum.mcp.specs import load_servers
        from ferrum.settings import Settings

        async def main():
            servers = {{
                "git": {{"module": "ferrum.mcp.servers.git", "args": ["--repository", "{tmp_path}/repository"]}},
                "fx": {{"module": "ferrum.testing.effects_server", "args": ["--log", "{tmp_path}/log"]}},
            }}
            router = Router(load_servers(Settings(mcp_servers=json.dumps(servers)), {{}}))
            await router.call(ToolCall(server="git", tool="status", arguments={{}}), "")
            await router.call(ToolCall(server="fx", tool="append", arguments={{"text": "up"}}), "")
            print("ready", flush=True)
            await router.call(ToolCall(server="fx", tool="append", arguments={{"text": "late", "delay_s": 60}}), "")

        asyncio.run(main())
        """
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=_ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        children = [int(pid) for pid in _children(process.pid)]
        assert len(children) == 2
        process.kill()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [pid for pid in children if _alive(pid)] == []
    assert (tmp_path / "log").read_text() == "\tup\n"


def _children(pid: int) -> list[str]:
    """Of all threads: a server belongs to the thread that started it."""
    return [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def test_the_router_can_be_imported_without_the_mcp_sdk() -> None:
    script = (
        "import sys, ferrum.mcp.router, ferrum.mcp.specs; sys.exit(' '.join({'mcp', 'mcp_types'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, cwd=_ROOT, capture_output=True, text=True)
    assert done.stderr == "\n"
