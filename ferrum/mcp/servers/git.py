"""An MCP server that reads one git repository: `python -m ferrum.mcp.servers.git --repository PATH`.

The repository may be a stranger's, and so may be the arguments. So that nothing in either is run or leads elsewhere:

- git is started with a list, never by a shell; a revision becomes a commit id before anything else sees it; a path is
  relative, has no `..`, stays out of `.git` and is taken literally.
- What a repository's own config could start (fsmonitor, hooks, filters, external diffs, text conversion, pagers,
  signature checks, remote helpers) is overridden, and submodules, which have a config of their own, are not entered.
- git gets a fresh environment; only PATH is ours.
- Files of the working tree are opened component by component, without following a link that was put there meanwhile.

The repository is named by its operator, so it may belong to another user: what git's `safe.directory` protects from is
overridden here anyway.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import stat as file_types
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel

#: The most that one call gives back, in bytes, lines of a log, and files.
_MOST_BYTES = 256 * 2**10
_MOST_COMMITS = 200
_MOST_FILES = 2000
#: What git may write for a list that is filtered here, in bytes.
_MOST_LISTED = 16 * 2**20
#: The longest one git may run, in seconds.
_PATIENCE = 25.0
_LONGEST_ARGUMENT = 4096

_OVERRIDES = {
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.attributesFile": os.devnull,
    "core.pager": "cat",
    "core.sshCommand": "false",
    "core.quotePath": "false",
    "credential.helper": "",
    "color.ui": "false",
    "diff.autoRefreshIndex": "false",
    "diff.external": "",
    "diff.mnemonicPrefix": "false",
    "diff.noprefix": "false",
    "diff.orderFile": os.devnull,
    "diff.relative": "false",
    "gpg.program": "false",
    "log.showSignature": "false",
    "protocol.allow": "never",
    "status.showUntrackedFiles": "normal",
    "status.submoduleSummary": "false",
    "submodule.recurse": "false",
}
_DIFF = ("--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short", "--ignore-submodules=dirty")
_FILTER_ACTS = {"clean": "", "smudge": "", "process": "", "required": "false"}


class Commit(BaseModel):
    """One commit of a log."""

    sha: str
    author: str
    #: When it was written, ISO 8601 with the author's own offset.
    date: str
    subject: str


class Log(BaseModel):
    """Commits, newest first."""

    commits: list[Commit]
    #: There are more than were asked for or may be given.
    truncated: bool


class Change(BaseModel):
    """One file that differs from the last commit."""

    path: str
    #: One letter each, as `git status --short` has them: staged, and in the working tree; `.` for no change.
    staged: str
    unstaged: str
    #: Where a renamed file was before.
    original_path: str | None = None


class Status(BaseModel):
    """Where the working tree stands."""

    #: `None` where no branch is checked out.
    branch: str | None
    #: `None` before the first commit.
    head: str | None
    upstream: str | None = None
    ahead: int = 0
    behind: int = 0
    clean: bool
    files: list[Change]
    truncated: bool


class Diff(BaseModel):
    """What differs, as a unified diff or a summary."""

    diff: str
    truncated: bool


class Shown(BaseModel):
    """One commit with what it changed against its first parent."""

    sha: str
    parents: list[str]
    author: str
    email: str
    date: str
    subject: str
    body: str
    diff: str
    truncated: bool


class Files(BaseModel):
    """Paths from the top of the repository, sorted."""

    files: list[str]
    truncated: bool


class FileText(BaseModel):
    """A file's text, or some of its lines."""

    path: str
    #: The commit it was read from; `None` for the working tree.
    revision: str | None
    #: 1-based, both inclusive; an end before the start means no lines.
    start_line: int
    end_line: int
    text: str
    truncated: bool


@dataclass(frozen=True, slots=True)
class _Output:
    data: bytes
    #: git had more to say.
    truncated: bool

    @property
    def text(self) -> str:
        """Whole lines only, where the end was cut off."""
        return _whole(self.data, b"\n", self.truncated).decode(errors="replace")

    @property
    def fields(self) -> list[str]:
        """What stands between NULs, the unfinished last one left out."""
        whole = _whole(self.data, b"\0", self.truncated).decode(errors="replace")
        return whole.removesuffix("\0").split("\0") if whole else []


class Repository:
    """A git repository that is only read."""

    def __init__(self, root: Path) -> None:
        """Raises `ValueError` where `root` is not the top of a working tree."""
        self.root = root.resolve()
        if not (self.root / ".git").exists():
            raise ValueError(f"{root} is not the top of a git working tree: there is no .git in it")

    async def git(
        self, *arguments: str, most: int = _MOST_BYTES, extra: Iterable[tuple[str, str]] = (), lenient: bool = False
    ) -> _Output:
        """Run git and return what it wrote, up to `most` bytes; `ToolError` with its words when it fails.

        With `lenient` a failure is an empty output.
        """
        process = await self._start(arguments, {**_OVERRIDES, **dict(extra)})
        assert process.stdout is not None
        assert process.stderr is not None
        complaint = asyncio.create_task(_read_to_end(process.stderr, 4096))
        try:
            async with asyncio.timeout(_PATIENCE):
                output = await _read(process.stdout, most)
                if output.truncated:
                    process.kill()
                    # asyncio does not notice the end of a process while one of its pipes is not read.
                    await _read_to_end(process.stdout, 0)
                status = await process.wait()
                said = (await complaint).decode(errors="replace").strip()
        except TimeoutError as error:
            raise ToolError(f"git {arguments[0]} took longer than {_PATIENCE:g} s; ask for less") from error
        finally:
            complaint.cancel()
            with suppress(ProcessLookupError):
                process.kill()
        if status and not output.truncated:
            if lenient:
                return _Output(b"", False)
            raise ToolError(_explained(said) or f"git {arguments[0]} failed with exit status {status}")
        return output

    async def _start(self, arguments: tuple[str, ...], config: dict[str, str]) -> asyncio.subprocess.Process:
        try:
            return await asyncio.create_subprocess_exec(
                "git",
                "--no-pager",
                f"--git-dir={self.root / '.git'}",
                f"--work-tree={self.root}",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=self.root,
                env=_environment(config),
            )
        except FileNotFoundError as error:
            raise ToolError("git is not on this server's PATH, or its repository is gone") from error

    async def commit(self, revision: str) -> str:
        """The id of the commit that a revision means."""
        _check_argument("revision", revision)
        if not revision or revision.startswith("-"):
            raise ToolError(f"{revision!r} is not a revision; give a branch, a tag, a commit id or such as HEAD~2")
        found = await self.git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", lenient=True)
        if not found.data:
            raise ToolError(f"there is no commit {revision!r}; `log` lists commits")
        return found.text.strip()

    async def inert(self) -> list[tuple[str, str]]:
        """Overrides for the filters that the repository's config names.

        They would be run on the files of the working tree whenever git compares them with a commit.
        """
        listed = await self.git("config", "--list", "--name-only", "-z", most=_MOST_LISTED)
        return [
            (f"{section}.{act}", value)
            for name in listed.fields
            if name.startswith("filter.") and name.count(".") > 1
            for section in [name.rpartition(".")[0]]
            for act, value in _FILTER_ACTS.items()
        ]

    def open(self, path: str) -> BinaryIO:
        """A regular file of the working tree; `ToolError` where there is none or it lies elsewhere."""
        try:
            real = (self.root / path).resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise ToolError(f"there is no file {path!r} in the working tree; `list_files` lists them") from error
        if not real.is_relative_to(self.root):
            raise ToolError(f"{path!r} leads out of the repository")
        inside = real.relative_to(self.root).as_posix()
        _check_path(inside)
        try:
            return _open_beneath(self.root, inside)
        except OSError as error:
            raise ToolError(f"{path!r} cannot be read: {error.strerror}") from error


def server(repository: Repository) -> MCPServer:
    """The server for one repository."""
    what = f"Reads the git repository {repository.root.name!r}."
    app = MCPServer("ferrum-git", instructions=what, log_level="WARNING")
    read_only = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False)
    tools = _Tools(repository)
    for tool in (tools.status, tools.log, tools.diff, tools.show, tools.list_files, tools.read_file):
        app.add_tool(tool, annotations=read_only)
    return app


class _Tools:
    """What the server offers; a tool's description is its docstring."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    async def status(self) -> Status:
        """The branch, the last commit, and the files that differ from it, untracked ones included."""
        output = await self._repository.git(
            "status",
            "--porcelain=v2",
            "--branch",
            "-z",
            "--ignore-submodules=dirty",
            extra=await self._repository.inert(),
        )
        return _status(output)

    async def log(
        self,
        max_count: int = 20,
        path: str | None = None,
        author: str | None = None,
        since: str | None = None,
        revision: str = "HEAD",
    ) -> Log:
        """Commits that `revision` contains, newest first.

        `path` keeps those that touched a file or directory, `author` those whose author's name or address contains
        it, `since` those after a date such as 2026-01-31 or "2 weeks ago". At most 200.
        """
        count = _between(max_count, 1, _MOST_COMMITS)
        options = [f"--max-count={count + 1}", "--format=%H%x00%an%x00%aI%x00%s", "-z", "--encoding=UTF-8"]
        if author:
            _check_argument("author", author)
            options += ["--fixed-strings", "--regexp-ignore-case", f"--author={author}"]
        if since:
            _check_argument("since", since)
            options.append(f"--since={since}")
        sha = await self._repository.commit(revision)
        output = await self._repository.git("log", "--no-show-signature", *options, sha, "--", *_pathspec(path))
        rows = list(_rows(output.fields, 4))
        commits = [Commit(sha=sha, author=who, date=date, subject=why) for sha, who, date, why in rows[:count]]
        return Log(commits=commits, truncated=output.truncated or len(rows) > count)

    async def diff(self, revisions: str | None = None, path: str | None = None, stat: bool = False) -> Diff:
        """A unified diff, or with `stat` a summary.

        `revisions` is `A..B` (from A to B), `A...B` (from where B left A, to B), `A` (from A to the working tree), or
        nothing (from the last commit to the working tree). Untracked files are not in it: see `status`.
        """
        sides, working_tree = await self._sides(revisions or "HEAD")
        extra = await self._repository.inert() if working_tree else []
        shape = ["--stat=120"] if stat else []
        output = await self._repository.git("diff", *_DIFF, *shape, sides, "--", *_pathspec(path), extra=extra)
        return Diff(diff=output.text, truncated=output.truncated)

    async def show(self, revision: str = "HEAD", path: str | None = None, stat: bool = False) -> Shown:
        """One commit: who, when, why, and what it changed against its first parent (with `stat`, a summary)."""
        sha = await self._repository.commit(revision)
        form = "--format=%H%x00%P%x00%an%x00%ae%x00%aI%x00%s%x00%b"
        head = await self._repository.git("log", "--no-show-signature", "-1", "-z", "--encoding=UTF-8", form, sha)
        found, parents, author, email, date, subject, body = head.data.decode(errors="replace").split("\0")[:7]
        shape = ["--stat=120"] if stat else []
        bare = ("--no-show-signature", "--format=", "-m", "--first-parent")
        output = await self._repository.git("show", *bare, *_DIFF, *shape, sha, "--", *_pathspec(path))
        return Shown(
            sha=found,
            parents=parents.split(),
            author=author,
            email=email,
            date=date,
            subject=subject,
            body=body.strip(),
            diff=output.text,
            truncated=output.truncated or head.truncated,
        )

    async def list_files(self, path: str | None = None, glob: str | None = None, revision: str | None = None) -> Files:
        """Files under a directory, of the working tree (untracked ones too, ignored ones not) or of a revision.

        `glob` keeps those that match: `*.py` by name in any directory, `src/**/test_*.py` by whole path. At most 2000.
        """
        if glob is not None:
            _check_argument("glob", glob)
        if revision is None:
            how = ["ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate"]
        else:
            how = ["ls-tree", "-r", "-z", "--name-only", "--full-tree", await self._repository.commit(revision)]
        output = await self._repository.git(*how, "--", *_pathspec(path), most=_MOST_LISTED)
        found = sorted(name for name in output.fields if glob is None or _matches(name, glob))
        return Files(files=found[:_MOST_FILES], truncated=output.truncated or len(found) > _MOST_FILES)

    async def read_file(
        self, path: str, revision: str | None = None, start_line: int = 1, end_line: int | None = None
    ) -> FileText:
        """A text file, of the working tree or of a revision; whole, or from `start_line` to `end_line` inclusive."""
        inside = _check_path(path)
        if start_line < 1 or (end_line is not None and end_line < start_line):
            raise ToolError("lines are counted from 1, and `end_line` is not before `start_line`")
        if revision is None:
            text, truncated = await asyncio.to_thread(self._lines_of_file, inside, start_line, end_line)
            return _file_text(inside, None, start_line, text, truncated)
        sha = await self._repository.commit(revision)
        output = await self._blob(sha, inside)
        _check_is_text(inside, output.data)
        text, truncated = _selected(_pieces(io.BytesIO(output.data)), start_line, end_line)
        return _file_text(inside, sha, start_line, text, truncated or output.truncated)

    def _lines_of_file(self, path: str, start: int, end: int | None) -> tuple[bytes, bool]:
        with self._repository.open(path) as file:
            _check_is_text(path, file.read(8000))
            file.seek(0)
            return _selected(_pieces(file), start, end)

    async def _blob(self, sha: str, path: str) -> _Output:
        entry = await self._repository.git("ls-tree", "-z", "--full-tree", sha, "--", path)
        mode, _, rest = entry.data.decode(errors="replace").partition(" ")
        if not mode:
            raise ToolError(f"there is no file {path!r} in {sha[:12]}; `list_files` lists them")
        if mode not in ("100644", "100755"):
            what = {"040000": "a directory", "120000": "a symbolic link", "160000": "a submodule"}.get(mode, "no file")
            raise ToolError(f"{path!r} is {what} in {sha[:12]}")
        return await self._repository.git("cat-file", "blob", rest.split()[1], most=_MOST_LISTED)

    async def _sides(self, revisions: str) -> tuple[str, bool]:
        """The revisions with commit ids for names, and whether the working tree is one side."""
        for dots in ("...", ".."):
            first, found, second = revisions.partition(dots)
            if found:
                old, new = first or "HEAD", second or "HEAD"
                return f"{await self._repository.commit(old)}{dots}{await self._repository.commit(new)}", False
        return await self._repository.commit(revisions), True


def _environment(config: dict[str, str]) -> dict[str, str]:
    """All that git gets to know of us."""
    env = {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C.UTF-8",
        "GIT_ALLOW_PROTOCOL": "none",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_LITERAL_PATHSPECS": "1",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_PAGER": "cat",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_CONFIG_COUNT": str(len(config)),
    }
    # Not `-c`: a filter's name may hold a `=`, where `-c` would end it.
    for number, (key, value) in enumerate(config.items()):
        env[f"GIT_CONFIG_KEY_{number}"] = key
        env[f"GIT_CONFIG_VALUE_{number}"] = value
    return env


async def _read(stream: asyncio.StreamReader, most: int) -> _Output:
    """Up to `most` bytes; more is left unread."""
    data = bytearray()
    while len(data) <= most:
        chunk = await stream.read(64 * 2**10)
        if not chunk:
            return _Output(bytes(data), False)
        data += chunk
    return _Output(bytes(data[:most]), True)


async def _read_to_end(stream: asyncio.StreamReader, most: int) -> bytes:
    """The first `most` bytes; what follows is read too, for the writer's sake."""
    data = b""
    while chunk := await stream.read(64 * 2**10):
        data += chunk[: most - len(data)]
    return data


def _explained(said: str) -> str:
    """git's complaint, with what to do where we know."""
    said = said.removeprefix("fatal: ").removeprefix("error: ")
    if "dubious ownership" in said:
        return f"{said.splitlines()[0]}: give the repository to the user that runs this server"
    return said


def _whole(data: bytes, end: bytes, truncated: bool) -> bytes:
    return data[: data.rfind(end) + 1] if truncated else data


def _rows(fields: list[str], width: int) -> Iterator[list[str]]:
    for start in range(0, len(fields) - width + 1, width):
        yield fields[start : start + width]


def _between(number: int, least: int, most: int) -> int:
    return max(least, min(number, most))


def _check_argument(name: str, value: str) -> None:
    if len(value) > _LONGEST_ARGUMENT or not value.isprintable():
        raise ToolError(f"{name} must be one line of at most {_LONGEST_ARGUMENT} printable characters")


def _check_path(path: str) -> str:
    """A path from the top of the repository, in its plain form."""
    if len(path) > _LONGEST_ARGUMENT or "\0" in path:
        raise ToolError("this is not a path")
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise ToolError(f"{path!r} leads out of the repository; give a path from its top, without '..'")
    # Some file systems do not tell `.GIT` from `.git`.
    if any(part.casefold() == ".git" for part in pure.parts):
        raise ToolError(f"{path!r} is git's own; use `log`, `show` and `diff`")
    return str(pure)


def _pathspec(path: str | None) -> list[str]:
    inside = _check_path(path) if path else "."
    return [] if inside == "." else [inside]


def _matches(name: str, glob: str) -> bool:
    if "/" not in glob:
        return fnmatchcase(name.rpartition("/")[2], glob)
    return _matches_parts(name.split("/"), glob.strip("/").split("/"))


def _matches_parts(names: list[str], globs: list[str]) -> bool:
    """Whether the parts fit, where `**` stands for any number of directories.

    Takes `len(names) × len(globs)` steps at most, whatever the pattern.
    """
    reached = {0}
    for glob in globs:
        if glob == "**":
            reached = set(range(min(reached), len(names) + 1))
        else:
            reached = {at + 1 for at in reached if at < len(names) and fnmatchcase(names[at], glob)}
        if not reached:
            return False
    return len(names) in reached


def _status(output: _Output) -> Status:
    """Read `git status --porcelain=v2 --branch -z`; see git-status(1)."""
    header: dict[str, str] = {}
    files: list[Change] = []
    fields = iter(output.fields)
    for field in fields:
        kind, _, rest = field.partition(" ")
        if kind == "#":
            name, _, value = rest.partition(" ")
            header[name] = value
        elif kind in ("?", "!"):
            files.append(Change(path=rest, staged=kind, unstaged=kind))
        elif kind in ("1", "2", "u"):
            path = rest.split(" ", {"1": 7, "2": 8, "u": 9}[kind])[-1]
            original = next(fields, None) if kind == "2" else None
            files.append(Change(path=path, staged=rest[0], unstaged=rest[1], original_path=original))
    ahead, behind = header.get("branch.ab", "+0 -0").split()
    return Status(
        branch=_unless(header.get("branch.head"), "(detached)"),
        head=_unless(header.get("branch.oid"), "(initial)"),
        upstream=header.get("branch.upstream"),
        ahead=int(ahead),
        behind=-int(behind),
        clean=not files,
        files=files[:_MOST_FILES],
        truncated=output.truncated or len(files) > _MOST_FILES,
    )


def _unless(value: str | None, nothing: str) -> str | None:
    return None if value == nothing else value


def _open_beneath(root: Path, inside: str) -> BinaryIO:
    """Open a regular file under `root`, refusing every link on the way: the path has none when it is resolved."""
    *directories, name = PurePosixPath(inside).parts or (".",)
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for directory in directories:
            below = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        # Not blocking: to open a pipe that nobody writes to would wait for ever.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    finally:
        os.close(at)
    if not file_types.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ToolError(f"{inside!r} is not a regular file; `list_files` lists files")
    return os.fdopen(file, "rb")


def _check_is_text(path: str, data: bytes) -> None:
    if b"\0" in data[:8000]:
        raise ToolError(f"{path!r} is not a text file")


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """Lines, those that are too long to give in pieces."""
    while piece := file.readline(_MOST_BYTES + 1):
        yield piece


def _selected(pieces: Iterable[bytes], start: int, end: int | None) -> tuple[bytes, bool]:
    """The lines asked for, and whether there would be more of them than may be given."""
    chosen = bytearray()
    line = 1
    for piece in pieces:
        if end is not None and line > end:
            break
        if line >= start:
            if len(chosen) + len(piece) > _MOST_BYTES:
                return bytes(chosen or piece[:_MOST_BYTES]), True
            chosen += piece
        line += piece.endswith(b"\n")
    return bytes(chosen), False


def _file_text(path: str, revision: str | None, start: int, data: bytes, truncated: bool) -> FileText:
    lines = data.count(b"\n") + (not data.endswith(b"\n") if data else 0)
    return FileText(
        path=path,
        revision=revision,
        start_line=start,
        end_line=start + lines - 1,
        text=data.decode(errors="replace"),
        truncated=truncated,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ferrum.mcp.servers.git", description="Reads a git repository.")
    parser.add_argument("--repository", type=Path, required=True, help="the top of a git working tree")
    try:
        repository = Repository(parser.parse_args().repository)
    except ValueError as error:
        parser.error(str(error))
    server(repository).run("stdio")


if __name__ == "__main__":
    main()
