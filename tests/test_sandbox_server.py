"""The sandbox as an MCP server: what an agent gets by it, and what it cannot ask for."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sandboxes import why_not

from ferrum.errors import ToolError
from ferrum.governance.acts import ToolCall
from ferrum.mcp.router import Router
from ferrum.mcp.specs import load_servers
from ferrum.sandbox import Kind
from ferrum.settings import Settings
from ferrum.testing.environment import environment

_Ask = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _isolation() -> None:
    if missing := why_not(Kind.BUBBLEWRAP):
        pytest.skip(f"NOT TESTED: no sandbox on this machine: {missing}")


def _session(story: Callable[[_Ask], Any], home: Path, **limits: Any) -> None:
    """Run `story` with a way to call tools of a server in this process."""
    # The MCP SDK is imported here: each process of xdist collects this file, and one runs it.
    from mcp import Client

    from ferrum.mcp.servers.sandbox import Limits, server

    async def run() -> None:
        async with Client(server(Limits(**limits))) as client:

            async def ask(tool: str, **arguments: Any) -> Any:
                result = await client.call_tool(tool, arguments)
                if result.is_error:
                    raise ToolError(result.content[0].text)
                return result.structured_content

            await story(ask)

    with environment({"FERRUM_HOME": str(home), "FERRUM_SANDBOX": "bubblewrap"}):
        asyncio.run(run())


def test_a_servers_file_gives_it_to_agents_as_tools(tmp_path: Path) -> None:
    env = {"FERRUM_HOME": str(tmp_path), "FERRUM_SANDBOX": "bubblewrap"}
    spec = {"module": "ferrum.mcp.servers.sandbox", "args": ["--memory", "128", "--timeout", "20"], "env": env}

    async def run() -> Any:
        router = Router(load_servers(Settings(mcp_servers=json.dumps({"sandbox": spec})), {}))
        try:
            act = ToolCall(server="sandbox", tool="run_python", arguments={"code": "print(6 * 7)"})
            return act.target, (await router.call(act, "")).output
        finally:
            await router.aclose()

    target, ran = asyncio.run(run())
    assert target == "sandbox.run_python"
    assert ran["stdout"] == "42\n"


def test_code_is_run_and_what_it_left_comes_back(tmp_path: Path) -> None:
    async def story(ask: _Ask) -> None:
        ran = await ask(
            "run_python",
            code="import json\nprint(open('data/in.txt').read())\nopen('out.md', 'w').write('# done')\n"
            "open('x.bin', 'wb').write(bytes([255]))\njson.dump({'n': 1}, open('output.json', 'w'))",
            files={"data/in.txt": "hello"},
            outputs=["out.md", "*.bin"],
        )
        assert ran["reason"] == "ok"
        assert ran["exit_code"] == 0
        assert ran["stdout"] == "hello\n"
        assert ran["output"] == {"n": 1}
        assert ran["files"] == {"out.md": "# done"}
        assert ran["cut"] == ["x.bin: it is not text, 1 bytes"]

        ran = await ask("run_shell", script="cat a.txt; echo oops >&2; exit 3", files={"a.txt": "from the shell"})
        assert (ran["reason"], ran["exit_code"]) == ("error", 3)
        assert (ran["stdout"], ran["stderr"]) == ("from the shell", "oops\n")

        # Nothing stays from one call to the next.
        ran = await ask("run_python", code="import os; print(os.listdir('.'))")
        assert ran["stdout"] == "[]\n"

    _session(story, tmp_path)


def test_a_caller_can_ask_for_less_than_the_server_allows_and_not_for_more(tmp_path: Path) -> None:
    # Filled, for what is only reserved is not used; and kept until somebody has looked.
    much = "import time; x = b'x' * (100 * 2**20); time.sleep(60)"

    async def memory(ask: _Ask) -> None:
        assert (await ask("run_python", code=much, memory=10_000))["reason"] == "memory"
        assert (await ask("run_python", code="print(1)", memory=32))["reason"] == "ok"

    async def time(ask: _Ask) -> None:
        assert (await ask("run_python", code="while True: pass", timeout=3600))["reason"] == "timeout"
        assert (await ask("run_python", code="while True: pass", timeout=0.1))["detail"].endswith("0.1 s")

    _session(memory, tmp_path, memory=64)
    _session(time, tmp_path, timeout=0.5)


def test_what_cannot_be_run_is_told_to_the_agent(tmp_path: Path) -> None:
    async def story(ask: _Ask) -> None:
        with pytest.raises(ToolError, match=r"no path within the working directory"):
            await ask("run_python", code="1", files={"../x": ""})
        with pytest.raises(ToolError, match="timeout_s"):
            await ask("run_python", code="1", timeout=-1)

    _session(story, tmp_path)


def test_long_output_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    async def story(ask: _Ask) -> None:
        code = "print('begin', 'x' * 50_000, 'end')\nopen('big.txt', 'w').write('y' * 300_000)"
        ran = await ask("run_python", code=code, outputs=["big.txt"])
        assert ran["stdout"].startswith("begin x")
        assert ran["stdout"].endswith("x end\n")
        assert len(ran["stdout"]) < 40_000
        assert ran["cut"] == ["big.txt: there is too much text, 300000 bytes", "stdout"]

    _session(story, tmp_path)


def test_an_unknown_runtime_is_told_with_what_to_type(tmp_path: Path) -> None:
    async def story(ask: _Ask) -> None:
        with pytest.raises(ToolError, match=r"did you mean 'python-data'"):
            await ask("run_python", code="1")

    _session(story, tmp_path, runtime="python-dat")


@pytest.mark.parametrize("arguments", [["--memory", "0"], ["--unknown"]])
def test_a_server_with_wrong_arguments_does_not_start(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ferrum.mcp.servers.sandbox import main

    monkeypatch.setattr(sys, "argv", ["server", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert arguments[0] in capsys.readouterr().err
