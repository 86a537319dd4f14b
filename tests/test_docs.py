"""What the README and the pages of `docs/` show is run, and what they list is in step with the code.

A comment before a block says what to do with it: `file: NAME` writes it, `example: NAME` is that file of `examples/`,
`prints` is what the block before it prints (run ids, times and sizes apart), `prints in part` some lines of that,
`waits` starts a command that a later block lets go on, `not run: …` says why not. The pages of the workflow language
are run in `test_docs_language.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis
import yaml
from fleet import PATIENCE_S, Fleet, ended, eventually
from preloading import AS_FORK, into

import ferrum
from ferrum.errors import WorkflowError
from ferrum.governance import Policy
from ferrum.local import trust
from ferrum.local.redis import PrivateRedis
from ferrum.mcp.specs import load_servers
from ferrum.models.prices import PriceFile
from ferrum.plan import Plan
from ferrum.settings import Settings
from ferrum.steps import StepType
from ferrum.testing.model_server import ModelServer
from ferrum.testing.script import Script
from ferrum.workflow import Workflow

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]

_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)?(?:#([^)]+))?\)")

#: Stands in for `redis-cli`, on a real Redis: `-u URL [-x] COMMAND …`.
_REDIS_CLI = """#!{python}
import sys, redis
url, *rest = sys.argv[2:]
words = rest[1:] + [sys.stdin.read()] if rest[0] == "-x" else rest
answer = redis.Redis.from_url(url, decode_responses=True).execute_command(*words)
print(answer)
"""

#: Stands in for the package `redis` of Node, on a real Redis, by way of the other stand-in.
_NODE_REDIS = """
import { execFileSync } from "node:child_process";
export function createClient({ url }) {
  const ask = async (...words) => {
    const said = execFileSync("redis-cli", ["-u", url, ...words], { encoding: "utf8" }).replace(/\\n$/, "");
    return said === "None" ? null : said;
  };
  return { async connect() { return this; }, lPush: (...words) => ask("LPUSH", ...words),
           get: (key) => ask("GET", key), async close() {} };
}
"""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    mark: str
    language: str
    text: str

    @property
    def file(self) -> str | None:
        return self.mark.removeprefix("file: ") if self.mark.startswith("file: ") else None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page.name, text[: found.start()].count("\n") + 1, found["mark"] or "", found["language"], found["text"])
        for found in _BLOCK.finditer(text)
    ]


ALL = [block for page in PAGES for block in blocks(page)]


def _named(kinds: list[Block]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", kinds, ids=lambda block: block.where)


# What is shown is what it claims to be.


@_named([block for block in ALL if block.language == "yaml"])
def test_every_yaml_block_is_what_it_shows(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    value = yaml.safe_load(block.text)
    match block.mark, value:
        case ("steps", _):
            Plan(Workflow.of({"name": "shown", "steps": value}))
        case (mark, _) if mark.startswith("example: "):
            example = ROOT / "examples" / mark.removeprefix("example: ")
            assert block.text == example.read_text(encoding="utf-8")
            Plan(Workflow.load(example))
        case ("budget", _):
            assert Workflow.of({"name": "x", "steps": {"a": {"type": "approval", "message": "?"}}, **value}).budget
        case ("wrong workflow", _):
            said = _next(block).text.strip()
            with pytest.raises(WorkflowError, match=re.escape(said)):
                Plan(Workflow.parse(block.text, said.partition(":")[0]))
        case (_, {"steps": _}):
            Plan(Workflow.parse(block.text, "shown.yaml"))
        case (_, {"servers": _} | {"mcpServers": _}):
            monkeypatch.setenv("SHOP_TOKEN", "not-so-secret")
            assert load_servers(Settings(mcp_servers=json.dumps(value)), os.environ)
        case (_, {"rules": _} | {"default": _}):
            assert Script.parse(block.text)
        case (_, {"models": _}):
            assert PriceFile.model_validate(value)
        case (_, {"allow": _} | {"ask": _} | {"deny": _}):
            assert Policy.parse(block.text).rules
        case _:
            pytest.fail(f"{block.where}: nothing says what this is")


def _next(block: Block) -> Block:
    return ALL[ALL.index(block) + 1]


def test_generated_parts_are_in_step_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python docs/generate.py` where this fails."""
    monkeypatch.syspath_prepend(DOCS)
    import generate

    for name in generate.PAGES:
        text = (DOCS / name).read_text(encoding="utf-8")
        assert generate.filled(text) == text, f"docs/{name} is out of date: run python docs/generate.py"
        assert "<!-- generated:" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            known = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in known, f"{page.name} links to {target}#{anchor}"


def test_every_page_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f"docs/{page.name}" not in readme] == []


def test_the_shown_step_type_is_one() -> None:
    (block,) = [block for block in ALL if block.mark == "step type"]
    names: dict[str, object] = {"__name__": "shown"}
    exec(compile(block.text, block.where, "exec"), names)
    kinds = [value for value in names.values() if isinstance(value, type) and issubclass(value, StepType)]
    (kind,) = [value for value in kinds if value is not StepType]
    assert kind().run(kind.params(text="hi"), None) == "HI"  # type: ignore[arg-type]


# What is shown is run.

_PRINTS = ("prints", "prints in part")


@dataclass
class Story:
    """A directory, a worker in it, a scripted model, and the blocks of one page, one after the other."""

    home: Path
    environ: dict[str, str]
    #: Started and waiting: the block, its process and where its output goes.
    waiting: list[tuple[Block, subprocess.Popen[str]]] = field(default_factory=list)
    begun: list[subprocess.Popen[str]] = field(default_factory=list)
    #: What each block printed.
    printed: dict[Block, str] = field(default_factory=dict)

    def tell(self, told: list[Block]) -> None:
        before: Block | None = None
        for block in told:
            if block.mark.startswith("not run") or block.file:
                continue
            if block.mark in _PRINTS:
                assert before is not None
                if before in self.printed:
                    self.check(before, block)
            elif block.language in ("sh", "python"):
                self.run(block)
                before = block
        for waited, process in self.waiting:
            self.printed[waited] = process.communicate(timeout=PATIENCE_S)[0]
            assert process.returncode == 0, f"{waited.where}:\n{self.printed[waited]}"
            shown = told[told.index(waited) + 1]
            if shown.mark in _PRINTS:
                self.check(waited, shown)

    def run(self, block: Block) -> None:
        text = block.text
        if "RUN_ID" in text:
            asked = eventually(ferrum.approvals)[0]
            text = text.replace("RUN_ID", asked.run_id).replace("DIGEST", asked.digest[:16])
        # Else what it starts would be no forks.
        text = text.replace("PYTHONPATH=examples", "PYTHONPATH=examples:$PYTHONPATH")
        if block.language == "python":
            command = [sys.executable, "-W", "error", "-c", text]
        else:
            command = ["bash", "-euo", "pipefail", "-c", text]
        process = subprocess.Popen(
            command,
            cwd=self.home,
            env=into({**self.environ, **AS_FORK}, "-c", "pytest"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.begun.append(process)
        if block.mark == "waits":
            self.waiting.append((block, process))
            return
        self.printed[block] = process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == 0, f"{block.where}:\n{self.printed[block]}"

    def end(self) -> None:
        for process in self.begun:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def check(self, block: Block, shown: Block) -> None:
        printed, said = Counter(_masked(self.printed[block])), Counter(_masked(shown.text))
        if shown.mark == "prints in part":
            del said["…"]
            printed &= said
        assert printed == said, f"{shown.where}:\n{self.printed[block]}"


def _masked(text: str) -> list[str]:
    """The lines, without what differs from run to run."""
    text = re.sub(r"(run|sch)_[0-9A-Z]{26}", "RUN", text)
    text = re.sub(r"\d{4}-\d\d-\d\d", "DATE", text)
    # Of more than a minute, pytest says twice how much.
    text = re.sub(r" \(\d:\d\d:\d\d\)", "", text)
    text = re.sub(r"\d\d:\d\d:\d\d", "TIME", text)
    text = re.sub(r"\b[0-9a-f]{12,64}\b", "HASH", text)
    text = re.sub(r"(\d+ [dhm] )?\d+(\.\d+)? (ms|s|m|h)(?!\w)|\d+\.\d\d+", "TIME", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


@contextmanager
def story(server: PrivateRedis, home: Path, told: list[Block]) -> Iterator[Story]:
    for block in told:
        if block.file:
            (home / block.file).write_text(block.text, encoding="utf-8")
    _repository(home)
    with ExitStack() as stack:
        script = home / "script.yaml"
        models = stack.enter_context(ModelServer(script if script.exists() else "Everything is better now."))
        imports = "my_tasks" if (home / "my_tasks.py").exists() else ""
        environ = {
            **models.environ,
            "FERRUM_MODEL": "openai/scripted",
            "FERRUM_POLICY": "",
            "FERRUM_IMPORTS": imports,
            "REDIS_URL": stack.enter_context(_on_tcp(server)),
            "PATH": f"{home / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(home),
            "NO_COLOR": "1",
            "LOGNAME": "ada",
        }
        fleet = Fleet(server.url, home, environ)
        for found in trust.find(home):
            # The worker is there before the page begins.
            found.trust(home)
        stack.callback(fleet.stop)
        if any(word in block.text for block in told for word in ("ferrum run", "ferrum.submit", "REDIS_URL")):
            fleet.start()
        told_here = Story(home, fleet.environ)
        # Before the worker: `ferrum run` would start another where there is none any more.
        stack.callback(told_here.end)
        yield told_here


def _repository(home: Path) -> None:
    """A git repository with a few commits, and stand-ins for the programs that the pages use."""
    git = ["git", "-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "init.defaultBranch=main"]
    subprocess.run([*git, "init", "-q"], cwd=home, check=True)
    for subject in ("Begin", "Count to three", "Count to four"):
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", subject], cwd=home, check=True)
    (home / "bin").mkdir()
    cli = home / "bin" / "redis-cli"
    cli.write_text(_REDIS_CLI.format(python=sys.executable))
    cli.chmod(0o755)
    package = home / "node_modules" / "redis"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"name": "redis", "type": "module", "exports": "./index.js"}')
    (package / "index.js").write_text(_NODE_REDIS)


@contextmanager
def _on_tcp(server: PrivateRedis) -> Iterator[str]:
    """The address of the tests' Redis for clients that know no sockets of Unix."""
    with redis.Redis.from_url(server.url) as client:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        client.config_set("port", port)
        password = client.connection_pool.connection_kwargs["password"]
        try:
            yield f"redis://:{password}@127.0.0.1:{port}/0"
        finally:
            client.config_set("port", 0)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "getting-started.md",
        "how-it-works.md",
        "policy.md",
        "python.md",
        "retrieval.md",
        "schedules.md",
        "testing.md",
    ],
)
def test_what_a_page_shows_works_and_prints_what_it_says(
    page: str, redis_server: PrivateRedis, clean_redis: str, tmp_path: Path
) -> None:
    told = [block for block in ALL if block.page == page]
    with story(redis_server, tmp_path, told) as one:
        one.tell(told)


def test_runs_can_be_sent_without_ferrum(redis_server: PrivateRedis, clean_redis: str, tmp_path: Path) -> None:
    told = [block for block in ALL if block.page == "enqueue.md"]
    with story(redis_server, tmp_path, told) as one:
        one.tell(told)
        if shutil.which("node"):
            one.run(Block("enqueue.md", 0, "", "sh", "node greet.mjs"))
        said = "".join(one.printed.values())
        runs = dict.fromkeys(re.findall(r"run_[0-9A-Z]{26}", said))
        greeted = []
        for run_id in runs:
            eventually(lambda run_id=run_id: [one for one in ferrum.approvals() if one.run_id == run_id])
            ferrum.decide(run_id, approved=True, by="a test")
            greeted.append(ended(run_id).outputs)
        names = ["Ada", "Grace", "Edsger", *(["Barbara"] if shutil.which("node") else [])]
        assert greeted == [{"said": f"Hello, {name}"} for name in names]
        # The same message again is the same run.
        again = [block for block in told if "redis-cli" in block.text and block.language == "sh"]
        one.run(again[0])
        assert set(re.findall(r"run_[0-9A-Z]{26}", one.printed[again[0]])) <= set(runs)
