"""The git server: what it answers, and what neither a repository nor an argument can make it do."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preloading import forked

from ferrum.errors import ToolError
from ferrum.governance.acts import ToolCall
from ferrum.mcp.router import Router
from ferrum.mcp.specs import load_servers
from ferrum.settings import Settings

_Ask = Callable[..., Any]
_SOMEONE = {"GIT_AUTHOR_NAME": "Ada", "GIT_AUTHOR_EMAIL": "ada@example.com"}
_CLEAN = {
    "PATH": os.environ["PATH"],
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_COMMITTER_NAME": "Bob",
    "GIT_COMMITTER_EMAIL": "bob@example.com",
    "GIT_AUTHOR_DATE": "2026-01-02T03:04:05+01:00",
    "GIT_COMMITTER_DATE": "2026-01-02T03:04:05+01:00",
}


def _git(repository: Path, *arguments: str, **environ: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=repository, env=_CLEAN | _SOMEONE | environ, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits: `first` with `a.txt` and `src/b.py`, and `second` by Grace, which changes `a.txt`."""
    top = tmp_path / "repository"
    (top / "src").mkdir(parents=True)
    _git(top, "init", "--quiet", "--initial-branch=main")
    (top / "a.txt").write_text("one\ntwo\nthree\n")
    (top / "src" / "b.py").write_text("print('hello')\n")
    _git(top, "add", ".")
    _git(top, "commit", "--quiet", "--message=first")
    _git(top, "tag", "v1")
    (top / "a.txt").write_text("one\n2\nthree\n")
    _git(top, "commit", "--quiet", "--all", "--message=second\n\nWhy it was done.", GIT_AUTHOR_NAME="Grace")
    return top


def _session(repository: Path, story: Callable[[_Ask], Any]) -> Any:
    """Run `story` with a way to call tools of one server for `repository`."""
    server = {"module": "ferrum.mcp.servers.git", "args": ["--repository", str(repository)], "env": forked()}
    text = json.dumps({"git": server})

    async def run() -> Any:
        router = Router(load_servers(Settings(mcp_servers=text), {}))

        async def ask(tool: str, **arguments: Any) -> Any:
            return (await router.call(ToolCall(server="git", tool=tool, arguments=arguments), "")).output

        try:
            return await story(ask)
        finally:
            await router.aclose()

    return asyncio.run(run())


def _ask(repository: Path, tool: str, **arguments: Any) -> Any:
    async def story(ask: _Ask) -> Any:
        return await ask(tool, **arguments)

    return _session(repository, story)


def test_every_tool_is_marked_read_only(repository: Path) -> None:
    async def story() -> None:
        text = json.dumps({"git": {"module": "ferrum.mcp.servers.git", "args": ["--repository", str(repository)]}})
        router = Router(load_servers(Settings(mcp_servers=text), {}))
        try:
            tools = await router.tools("git")
        finally:
            await router.aclose()
        assert {tool.name for tool in tools if tool.read_only} == {
            "status",
            "log",
            "diff",
            "show",
            "list_files",
            "read_file",
        }
        assert all(tool.read_only and tool.description for tool in tools)

    asyncio.run(story())


def test_status_says_branch_and_changes(repository: Path) -> None:
    (repository / "a.txt").write_text("changed\n")
    (repository / "new file").write_text("x")
    _git(repository, "mv", "src/b.py", "src/c.py")
    assert _ask(repository, "status") == {
        "branch": "main",
        "head": _git(repository, "rev-parse", "HEAD"),
        "upstream": None,
        "ahead": 0,
        "behind": 0,
        "clean": False,
        "files": [
            {"path": "a.txt", "staged": ".", "unstaged": "M", "original_path": None},
            {"path": "src/c.py", "staged": "R", "unstaged": ".", "original_path": "src/b.py"},
            {"path": "new file", "staged": "?", "unstaged": "?", "original_path": None},
        ],
        "truncated": False,
    }


def test_status_of_a_repository_without_a_commit_has_no_head(tmp_path: Path) -> None:
    _git(tmp_path, "init", "--quiet", "--initial-branch=trunk")
    status = _ask(tmp_path, "status")
    assert (status["branch"], status["head"], status["clean"]) == ("trunk", None, True)


def test_log_lists_commits_and_keeps_those_asked_for(repository: Path) -> None:
    async def story(ask: _Ask) -> None:
        first, second = _git(repository, "rev-parse", "v1"), _git(repository, "rev-parse", "HEAD")
        date = "2026-01-02T03:04:05+01:00"
        assert await ask("log") == {
            "commits": [
                {"sha": second, "author": "Grace", "date": date, "subject": "second"},
                {"sha": first, "author": "Ada", "date": date, "subject": "first"},
            ],
            "truncated": False,
        }
        assert [c["sha"] for c in (await ask("log", path="src"))["commits"]] == [first]
        assert [c["sha"] for c in (await ask("log", author="GRACE"))["commits"]] == [second]
        assert [c["sha"] for c in (await ask("log", revision="v1"))["commits"]] == [first]
        assert (await ask("log", since="2026-06-01"))["commits"] == []
        assert (await ask("log", max_count=1))["truncated"]

    _session(repository, story)


def test_diff_compares_commits_and_the_working_tree(repository: Path) -> None:
    async def story(ask: _Ask) -> None:
        assert "-two\n+2\n" in (await ask("diff", revisions="v1..HEAD"))["diff"]
        assert "-two\n+2\n" in (await ask("diff", revisions="v1...main"))["diff"]
        assert (await ask("diff", revisions="v1..HEAD", path="src"))["diff"] == ""
        assert (await ask("diff"))["diff"] == ""
        assert "a.txt | 2 +-" in (await ask("diff", revisions="v1", stat=True))["diff"]
        (repository / "a.txt").write_text("0\n")
        assert "+0\n" in (await ask("diff"))["diff"]

    _session(repository, story)


def test_show_gives_a_commit_with_its_change(repository: Path) -> None:
    shown = _ask(repository, "show", revision="main")
    assert (shown["author"], shown["email"], shown["subject"], shown["body"]) == (
        "Grace",
        "ada@example.com",
        "second",
        "Why it was done.",
    )
    assert shown["parents"] == [_git(repository, "rev-parse", "v1")]
    assert "-two\n+2\n" in shown["diff"]


def test_files_are_listed_by_directory_glob_and_revision(repository: Path) -> None:
    (repository / ".gitignore").write_text("*.log\n")
    (repository / "x.log").touch()
    (repository / "src" / "deep").mkdir()
    (repository / "src" / "deep" / "c.py").touch()

    async def story(ask: _Ask) -> None:
        async def files(**arguments: Any) -> Any:
            return (await ask("list_files", **arguments))["files"]

        assert await files() == [".gitignore", "a.txt", "src/b.py", "src/deep/c.py"]
        assert await files(path="src/") == ["src/b.py", "src/deep/c.py"]
        assert await files(glob="*.py") == ["src/b.py", "src/deep/c.py"]
        assert await files(glob="src/*.py") == ["src/b.py"]
        assert await files(glob="src/**/*.py") == ["src/b.py", "src/deep/c.py"]
        assert await files(glob="**") == [".gitignore", "a.txt", "src/b.py", "src/deep/c.py"]
        assert await files(revision="v1") == ["a.txt", "src/b.py"]
        assert await files(revision="v1", path="src") == ["src/b.py"]

    _session(repository, story)


def test_a_file_is_read_whole_in_part_and_as_it_was(repository: Path) -> None:
    (repository / "a.txt").write_text("now\r\nlast")

    async def story(ask: _Ask) -> None:
        assert await ask("read_file", path="a.txt") == {
            "path": "a.txt",
            "revision": None,
            "start_line": 1,
            "end_line": 2,
            "text": "now\r\nlast",
            "truncated": False,
        }
        assert (await ask("read_file", path="./a.txt", start_line=2))["text"] == "last"
        old = await ask("read_file", path="a.txt", revision="v1", start_line=2, end_line=2)
        assert (old["text"], old["end_line"], old["revision"]) == ("two\n", 2, _git(repository, "rev-parse", "v1"))
        beyond = await ask("read_file", path="a.txt", start_line=9)
        assert (beyond["text"], beyond["end_line"]) == ("", 8)

    _session(repository, story)


def test_more_than_may_be_given_is_cut_at_a_line_and_says_so(repository: Path) -> None:
    lines = "".join(f"line {number}\n" for number in range(200_000))
    (repository / "long.txt").write_text(lines)
    (repository / "wide.txt").write_text("x" * 1_000_000 + "\nsecond\n")
    _git(repository, "add", ".")
    _git(repository, "commit", "--quiet", "--message=long")

    async def story(ask: _Ask) -> None:
        for revision in (None, "HEAD"):
            read = await ask("read_file", path="long.txt", revision=revision)
            assert read["truncated"]
            assert lines.startswith(read["text"])
            assert read["text"].endswith("\n")
            rest = await ask("read_file", path="long.txt", revision=revision, start_line=199_999)
            assert (rest["text"], rest["truncated"]) == ("line 199998\nline 199999\n", False)
            assert (await ask("read_file", path="wide.txt", revision=revision, start_line=2))["text"] == "second\n"
        shown = await ask("show")
        assert shown["truncated"]
        assert len(shown["diff"]) < 300_000

    _session(repository, story)


#: A tool, what it is asked, and what it says.
_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("log", {"revision": "--output=pwned"}, "is not a revision"),
    ("show", {"revision": "-p"}, "is not a revision"),
    ("show", {"revision": "HEAD\n--all"}, "revision must be one line"),
    ("show", {"revision": "nothing"}, "there is no commit 'nothing'"),
    ("show", {"revision": "HEAD:a.txt"}, "there is no commit"),
    ("diff", {"revisions": "--output=pwned"}, "is not a revision"),
    ("diff", {"revisions": "HEAD..--output=pwned"}, "is not a revision"),
    ("diff", {"revisions": "--no-index..HEAD"}, "is not a revision"),
    ("log", {"path": "../other"}, "leads out of the repository"),
    ("log", {"path": "src/../../other"}, "leads out of the repository"),
    ("list_files", {"path": "/etc"}, "leads out of the repository"),
    ("read_file", {"path": "/etc/passwd"}, "leads out of the repository"),
    ("read_file", {"path": "../secret"}, "leads out of the repository"),
    ("read_file", {"path": "way-out"}, "leads out of the repository"),
    ("read_file", {"path": "way-up/secret"}, "leads out of the repository"),
    ("read_file", {"path": ".git/config"}, "is git's own"),
    ("read_file", {"path": "src/.GIT/config"}, "is git's own"),
    ("read_file", {"path": "way-in"}, "is git's own"),
    ("read_file", {"path": "loop"}, "there is no file 'loop'"),
    ("read_file", {"path": "pipe"}, "is not a regular file"),
    ("read_file", {"path": "src"}, "is not a regular file"),
    ("read_file", {"path": "gone"}, "there is no file 'gone' in the working tree"),
    ("read_file", {"path": "binary"}, "is not a text file"),
    ("read_file", {"path": "way-out", "revision": "HEAD"}, "is a symbolic link"),
    ("read_file", {"path": "src", "revision": "HEAD"}, "is a directory"),
    ("read_file", {"path": "gone", "revision": "HEAD"}, "there is no file 'gone'"),
    ("read_file", {"path": "a.txt", "start_line": 0}, "lines are counted from 1"),
]


def test_what_leads_elsewhere_is_refused(repository: Path) -> None:
    (repository.parent / "secret").write_text("secret")
    (repository / "way-out").symlink_to("../secret")
    (repository / "way-up").symlink_to("..")
    (repository / "way-in").symlink_to(".git/config")
    (repository / "loop").symlink_to("loop")
    (repository / "way-home").symlink_to("a.txt")
    (repository / "binary").write_bytes(b"a\0b")
    _git(repository, "add", ".")
    _git(repository, "commit", "--quiet", "--message=links")
    os.mkfifo(repository / "pipe")

    async def story(ask: _Ask) -> None:
        for tool, arguments, said in _REFUSED:
            with pytest.raises(ToolError, match=said):
                await ask(tool, **arguments)
        assert (await ask("read_file", path="way-home"))["text"] == "one\n2\nthree\n"
        # A leading dash is an ordinary name where a path is meant, and so is what looks like a pattern.
        assert (await ask("log", path="--output=pwned"))["commits"] == []
        assert (await ask("list_files", path=":(top)src"))["files"] == []

    _session(repository, story)
    assert not (repository / "pwned").exists()


def test_nothing_that_a_hostile_repository_configures_is_run(repository: Path) -> None:
    marks = repository.parent / "marks"
    marks.mkdir()

    def trap(name: str) -> str:
        script = marks.parent / f"trap-{name}"
        script.write_text(f"#!/bin/sh\ntouch {marks}/{name}\ncat\n")
        script.chmod(0o755)
        return str(script)

    (repository / ".gitattributes").write_text("*.txt filter=a=b diff=evil\n*.py filter=plain diff=evil\n")
    _git(repository, "add", ".")
    _git(repository, "commit", "--quiet", "--message=attributes")
    (repository / "a.txt").write_text("changed\n")
    (repository / "src" / "b.py").write_text("changed\n")
    for key, value in {
        "core.fsmonitor": trap("fsmonitor"),
        "core.pager": trap("pager"),
        "core.sshCommand": trap("ssh"),
        "core.hooksPath": str(marks.parent / "hooks"),
        "diff.external": trap("external"),
        "diff.evil.command": trap("command"),
        "diff.evil.textconv": trap("textconv"),
        "filter.a=b.clean": trap("clean"),
        "filter.a=b.required": "true",
        "filter.plain.process": trap("process"),
        "gpg.program": trap("gpg"),
        "log.showSignature": "true",
        "status.submoduleSummary": "true",
        "core.worktree": "/",
        "color.ui": "always",
        "diff.noprefix": "true",
    }.items():
        _git(repository, "config", key, value)
    (marks.parent / "hooks").mkdir()
    (marks.parent / "hooks" / "post-index-change").symlink_to(trap("hook"))

    async def story(ask: _Ask) -> None:
        status = await ask("status")
        assert [file["path"] for file in status["files"]] == ["a.txt", "src/b.py"]
        diff = (await ask("diff"))["diff"]
        assert "--- a/a.txt\n" in diff
        assert "+changed\n" in diff
        await ask("diff", revisions="v1..HEAD")
        await ask("log", path="a.txt")
        await ask("show")
        await ask("list_files")
        await ask("read_file", path="a.txt", revision="HEAD")

    _session(repository, story)
    assert [mark.name for mark in marks.iterdir()] == []


def test_a_submodule_with_a_hostile_config_is_not_entered(repository: Path) -> None:
    mark = repository.parent / "mark"
    inner = repository / "inner"
    inner.mkdir()
    _git(inner, "init", "--quiet")
    (inner / "x").write_text("x")
    (inner / ".gitattributes").write_text("x filter=evil\n")
    _git(inner, "add", ".")
    _git(inner, "commit", "--quiet", "--message=inner")
    _git(repository, "-c", "advice.addEmbeddedRepo=false", "add", "inner")
    _git(repository, "commit", "--quiet", "--message=submodule")
    (inner / "x").write_text("y")
    _git(inner, "config", "filter.evil.clean", f"touch {mark}; cat")
    _git(repository, "config", "diff.submodule", "diff")

    async def story(ask: _Ask) -> None:
        await ask("status")
        await ask("diff")
        assert "Subproject commit" in (await ask("show"))["diff"]

    _session(repository, story)
    assert not mark.exists()


def test_a_missing_object_is_not_fetched_from_where_a_repository_says(repository: Path) -> None:
    mark = repository.parent / "mark"
    blob = _git(repository, "rev-parse", "HEAD:a.txt")
    (repository / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    for key, value in {
        "core.repositoryFormatVersion": "1",
        "extensions.partialClone": "evil",
        "remote.evil.promisor": "true",
        "remote.evil.url": f"ext::sh -c touch% {mark}",
        "remote.evil.uploadpack": f"touch {mark};",
        "protocol.ext.allow": "always",
        "protocol.allow": "always",
    }.items():
        _git(repository, "config", key, value)

    async def story(ask: _Ask) -> None:
        with pytest.raises(ToolError):
            await ask("read_file", path="a.txt", revision="HEAD")
        _git(repository, "config", "remote.evil.url", str(repository))
        with pytest.raises(ToolError):
            await ask("read_file", path="a.txt", revision="HEAD")

    _session(repository, story)
    assert not mark.exists()


def test_reading_changes_nothing_in_the_repository(repository: Path) -> None:
    # The index would be written anew: what it remembers of this file is no longer so.
    os.utime(repository / "a.txt", (1, 1))
    before = (repository / ".git" / "index").read_bytes()

    async def story(ask: _Ask) -> None:
        await ask("status")
        await ask("diff")

    _session(repository, story)
    assert (repository / ".git" / "index").read_bytes() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a repository away")
def test_a_repository_of_another_user_is_read(repository: Path) -> None:
    for path in [repository, *repository.rglob("*")]:
        os.chown(path, 65534, 65534)
    assert len(_ask(repository, "log")["commits"]) == 2
    assert _ask(repository, "status")["clean"]


def test_a_place_that_is_no_repository_is_an_error_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="is not the top of a git working tree"):
        _ask(tmp_path, "status")
