"""The servers file: what an operator may write, and what they are told when it is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ferrum.errors import SettingsError
from ferrum.local import trust
from ferrum.mcp.specs import ServerSpec, load_servers
from ferrum.settings import Settings


def _load(text: str, **environ: str) -> dict[str, ServerSpec]:
    return dict(load_servers(Settings(mcp_servers=text), environ))


def _refusal(text: str, **environ: str) -> str:
    with pytest.raises(SettingsError) as caught:
        _load(text, **environ)
    return str(caught.value)


def test_servers_are_read_from_the_json_that_other_clients_use() -> None:
    servers = _load(
        '{"mcpServers": {"time": {"type": "stdio", "command": "uvx", "args": ["mcp-server-time"], "cwd": "/"}}}'
    )
    assert servers == {"time": ServerSpec("uvx", ("mcp-server-time",), cwd=Path("/"))}


def test_a_bare_map_of_servers_will_do_in_the_environment() -> None:
    assert _load('{"time": {"command": "t"}}') == {"time": ServerSpec("t")}


def test_json_may_be_indented_with_tabs() -> None:
    assert _load('{\n\t"time": {\n\t\t"command": "t"\n\t}\n}') == {"time": ServerSpec("t")}


@pytest.mark.parametrize("top", ["servers", "mcpServers"])
def test_a_yaml_file_names_servers_under_either_key(tmp_path: Path, top: str) -> None:
    file = tmp_path / "them.yaml"
    file.write_text(f"{top}:\n  a_1-b:\n    command: x\n    timeout: 2.5\n    start_timeout: 60\n")
    assert load_servers(Settings(servers=file), {}) == {"a_1-b": ServerSpec("x", timeout=2.5, start_timeout=60)}


def test_the_file_in_the_working_directory_is_read_when_nothing_else_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = Settings(home=tmp_path / "home")
    assert load_servers(here, {}) == {}
    Path("ferrum.servers.yaml").write_text("servers: {a: {command: x}}")
    for found in trust.find(tmp_path):
        found.trust(here.home)
    assert load_servers(here, {}) == {"a": ServerSpec("x")}
    assert load_servers(Settings(mcp_servers="{}"), {}) == {}


def test_a_file_that_was_named_and_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"gone\.yaml: the servers file cannot be read"):
        load_servers(Settings(servers=tmp_path / "gone.yaml"), {})


def test_a_module_is_run_by_the_interpreter_that_runs_ferrum() -> None:
    spec = _load('{"a": {"module": "their.server", "args": ["-v"]}}')["a"]
    assert (spec.command, spec.args, spec.env) == (sys.executable, ("-m", "their.server", "-v"), {})


def test_a_module_of_ferrum_is_not_looked_for_in_the_working_directory() -> None:
    assert _load('{"a": {"module": "ferrum.mcp.servers.git"}}')["a"].args == ("-P", "-m", "ferrum.mcp.servers.git")


def test_variables_are_replaced_in_arguments_and_environment() -> None:
    spec = _load(
        '{"a": {"command": "x", "args": ["--url=${HOST}:${PORT}", "$${HOST}"], "env": {"TOKEN": "${MY_PAT}"}}}',
        HOST="h",
        PORT="1",
        MY_PAT="hunter2hunter2",
    )
    assert spec["a"].args == ("--url=h:1", "${HOST}")
    assert spec["a"].env == {"TOKEN": "hunter2hunter2"}
    assert spec["a"].secrets == ("hunter2hunter2",)


def test_a_spec_does_not_print_what_may_be_secret() -> None:
    spec = _load('{"a": {"command": "x", "args": ["${PAT}"], "env": {"T": "${PAT}"}}}', PAT="hunter2hunter2")["a"]
    assert "hunter2" not in repr(spec)


def test_a_missing_variable_is_named_with_the_nearest_one_but_not_with_all_there_are() -> None:
    assert "a.env.T: ${GITHUB_TOKN} is not set in the environment (did you mean 'GITHUB_TOKEN'?)" in _refusal(
        '{"a": {"command": "x", "env": {"T": "${GITHUB_TOKN}"}}}', GITHUB_TOKEN="x", OTHER="y"
    )
    assert _refusal('{"a": {"command": "x", "args": ["${QQ}"]}}', OTHER="y").endswith("not set in the environment")


def test_everything_wrong_in_a_file_is_said_at_once_each_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "servers:\n"
        "  git:\n"
        "    comand: git-server\n"
        "    args: [--port, 80]\n"
        "  Web:\n"
        "    command: x\n"
        "  far:\n"
        "    url: https://example.com/mcp\n"
        "  twice:\n"
        "    command: x\n"
        "    command: y\n"
        "  slow: {command: x, timeout: -1}\n"
        "sever: {}\n"
    )
    with pytest.raises(SettingsError) as caught:
        load_servers(Settings(servers=file), {})
    said = [line.removeprefix(f"{file}:") for line in str(caught.value).splitlines()]
    assert said == [
        "2:3: servers.git: give `command` (a program) or `module` (a Python module), and not both",
        "3:5: servers.git.comand: unknown key 'comand' (did you mean 'command'?)",
        "4:5: servers.git.args: this must be text; put it in quotes",
        "5:3: servers.Web: a server's name is made of a-z, 0-9, '_' and '-'",
        "8:5: servers.far.url: servers over HTTP are not there yet; give a `command` that is started here",
        "11:5: servers.twice.command: is there twice; keep one",
        "12:22: servers.slow.timeout: -1 must be a number of seconds above 0",
        "13:1: sever: unknown key 'sever' (did you mean 'servers'?)",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("servers: [", "FERRUM_MCP_SERVERS:1:"),
        ("[1]", "FERRUM_MCP_SERVERS: this must be a map"),
        ('{"a": 1}', "a: a server is a map"),
        ('{"servers": 1}', "servers: this must be a map"),
        ('{"a": {"command": ""}}', "a.command: this must not be empty"),
        ('{"a": {"command": "x", "args": "y"}}', "a.args: this must be a list"),
        ('{"a": {"command": "x", "env": {"A B": "y"}}}', "a.env.A B: not the name of an environment variable"),
        ('{"a": {"command": "x", "env": {"A": "${B:-c}"}}}', "'${B:-c}' is no variable"),
        ('{"a": {"command": "x", "timeout": true}}', "a.timeout: True must be a number of seconds"),
        ('{"a": {"command": "x", "type": "sse"}}', "a.type: only `stdio` is there yet"),
        ('{"a": {"command": "x", "module": "y"}}', "and not both"),
    ],
)
def test_a_mistake_is_refused_with_what_to_do(text: str, said: str) -> None:
    assert said in _refusal(text)


def test_a_password_of_digits_without_quotes_is_not_shown() -> None:
    servers = {"shop": {"command": "x", "env": {"SHOP_TOKEN": 12345678}}}
    with pytest.raises(SettingsError, match=r"env\.SHOP_TOKEN: this must be text; put it in quotes") as raised:
        load_servers(Settings(mcp_servers=json.dumps(servers)), {})
    assert "12345678" not in str(raised.value)
