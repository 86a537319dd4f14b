"""`ferrum index …`, as people and scripts use it, and what it reads."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ferrum import cli
from ferrum.cli.index import pairs
from ferrum.errors import InputError
from ferrum.retrieval import LeftOut, Original, documents, embedders, read
from ferrum.testing.environment import environment, nothing_of_the_machine
from ferrum.testing.model_server import ModelServer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a command line in this process and in a folder of its own: its exit status, stdout and stderr."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*arguments: str, tenant: str = "default") -> tuple[int, str, str]:
        with environment({"FERRUM_HOME": str(tmp_path / "home"), "FERRUM_TENANT": tenant}):
            status = cli.status_of(["index", *arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    with environment({**nothing_of_the_machine(), **dict.fromkeys(embedders.DEFAULTS, "")}):
        yield run


def write(**files: str) -> None:
    for name, text in files.items():
        path = Path("docs", f"{name}.md")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_an_index_is_created_filled_searched_listed_and_dropped(ran: Run) -> None:
    write(cats="# Cats\n\nThe cat purrs.", dogs="# Dogs\n\nThe dog barks.")
    assert ran("list") == (0, "", "no indexes yet: make one with 'ferrum index create NAME'\n")
    assert ran("create", "pets", "--embedding", "lexical") == (
        0,
        "pets  lexical/1 (compares words, not meaning; name a model for better)\n",
        "",
    )
    assert ran("add", "pets", "docs") == (0, "2 added, 0 updated, 0 unchanged; 2 texts embedded\n", "")
    assert ran("add", "pets", "docs/*.md") == (0, "0 added, 0 updated, 2 unchanged; 0 texts embedded\n", "")
    status, out, err = ran("search", "pets", "purring cats", "--top-k", "1")
    assert (status, err) == (0, "")
    assert out == "1.000  docs/cats.md:1-3  Cats\n       # Cats\n       \n       The cat purrs.\n\n"
    status, out, _ = ran("list")
    assert out.split()[:5] == ["pets", "2", "documents", "2", "chunks"]
    assert ran("list", tenant="other")[1] == ""
    assert ran("drop", "pets") == (0, "dropped pets\n", "")
    assert ran("search", "pets", "cat")[0] == 2


def test_everything_comes_as_json(ran: Run) -> None:
    write(cats="# Cats\n\nThe cat purrs.")
    made = json.loads(ran("create", "pets", "--embedding", "none", "--json")[1])
    assert {name: made[name] for name in ("tenant", "name", "embedding", "dimension", "about")} == {
        "tenant": "default",
        "name": "pets",
        "embedding": "none",
        "dimension": None,
        "about": "no vectors, searched by words only",
    }
    added = json.loads(ran("add", "pets", "docs", "-m", "kind=animal", "-m", "tag=a", "-m", "tag=b", "--json")[1])
    assert added == {"added": 1, "updated": 0, "unchanged": 0, "removed": 0, "embedded": 0, "left_out": []}
    found = json.loads(ran("search", "pets", "purr", "--filter", "kind=animal", "--json")[1])
    assert found == {
        "documents": [
            {
                "text": "# Cats\n\nThe cat purrs.",
                "score": 1.0,
                "source": "docs/cats.md",
                "position": {"line": 1, "end_line": 3, "heading": "Cats"},
                "metadata": {"kind": "animal", "tag": ["a", "b"]},
            }
        ]
    }
    assert json.loads(ran("search", "pets", "purr", "-f", "kind=metal", "--json")[1]) == {"documents": []}
    (listed,) = json.loads(ran("list", "--json")[1])
    assert (listed["sources"], listed["chunks"]) == (1, 1)
    assert json.loads(ran("drop", "pets", "--json")[1]) == {"dropped": "pets"}


def test_what_is_gone_is_pruned_when_asked(ran: Run) -> None:
    write(a="one", b="two")
    ran("create", "docs", "--embedding", "none")
    ran("add", "docs", "docs")
    Path("docs/a.md").unlink()
    assert (
        ran("add", "docs", "./docs/", "--prune")[1] == "0 added, 0 updated, 1 unchanged, 1 removed; 0 texts embedded\n"
    )


def sources(ran: Run, name: str = "docs") -> list[str]:
    """All documents with the word `text`."""
    found = json.loads(ran("search", name, "text", "--top-k", "100", "--json")[1])["documents"]
    return sorted(one["source"] for one in found)


@pytest.mark.parametrize("gone", ["docs/b.md", "docs/b*", "docs/**/b.md", "docs", ".", "./docs/../docs/b.md"])
def test_a_document_whose_file_is_gone_is_pruned_by_every_argument_that_would_find_it(ran: Run, gone: str) -> None:
    write(a="one text", b="two text")
    ran("create", "docs", "--embedding", "none")
    ran("add", "docs", ".")
    ran("add", "docs", "docs/*.md")
    for path in ("docs/a.md", "docs/b.md") if gone == "docs" else ("docs/b.md",):
        Path(path).unlink()
    if gone == "docs":
        Path("docs").rmdir()
    status, out, err = ran("add", "docs", gone, "--prune")
    assert (status, err) == (0, "")
    assert f"{2 if gone == 'docs' else 1} removed" in out
    assert sources(ran) == ([] if gone == "docs" else ["docs/a.md"])


def test_pruning_a_folder_leaves_alone_what_would_not_be_found_there(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write(a="one text")
    Path("docs2").mkdir()
    Path("docs2/c.md").write_text("other text")
    Path("docs/.hidden.md").write_text("hidden text")
    ran("create", "docs", "--embedding", "none")
    ran("add", "docs", "docs", "docs2", "docs/.hidden.md")
    Path("docs/.hidden.md").unlink()
    Path("docs2/c.md").unlink()
    assert "removed" not in ran("add", "docs", "docs", "docs/*.md", "--prune")[1]
    # The same names in another folder are other files.
    Path("docs/a.md").unlink()
    Path("elsewhere/docs").mkdir(parents=True)
    monkeypatch.chdir("elsewhere")
    assert "removed" not in ran("add", "docs", "docs", "--prune")[1]
    assert sources(ran) == ["docs/.hidden.md", "docs/a.md", "docs2/c.md"]


@pytest.mark.parametrize("unread", ["docs", "docs/sub"])
def test_what_is_in_a_folder_that_cannot_be_read_is_not_pruned(
    ran: Run, monkeypatch: pytest.MonkeyPatch, unread: str
) -> None:
    write(a="one text")
    Path("docs/sub").mkdir()
    Path("docs/sub/b.md").write_text("two text")
    ran("create", "docs", "--embedding", "none")
    ran("add", "docs", "docs")
    scan = os.scandir

    def scandir(path: str) -> Any:
        if path == unread:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    status, out, err = ran("add", "docs", "docs", "--prune")
    assert (status, err) == (
        0,
        f"left out: {unread!r} is a folder that cannot be read: what is in the index of it stays\n",
    )
    assert "removed" not in out
    assert sources(ran) == ["docs/a.md", "docs/sub/b.md"]


def test_a_file_has_one_name_however_it_is_found(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write(a="one text")
    ran("create", "docs", "--embedding", "none")
    ran("add", "docs", "docs", f"{Path.cwd()}/docs/a.md")
    Path("way").symlink_to("docs", target_is_directory=True)
    monkeypatch.chdir("docs")
    assert (
        ran("add", "docs", "a.md", "../docs", "../way", "../way/a.md", "../way/*.md")[1]
        == "0 added, 0 updated, 1 unchanged; 0 texts embedded\n"
    )
    assert sources(ran) == ["docs/a.md"]


def test_a_name_is_not_taken_from_a_file_that_is_still_there(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path.cwd()
    for project in ("one", "two"):
        Path(project).mkdir()
        Path(project, "README.md").write_text(f"{project} text")
    ran("create", "docs", "--embedding", "none")
    monkeypatch.chdir(home / "one")
    ran("add", "docs", ".")
    monkeypatch.chdir(home / "two")
    why = f"'README.md' in index 'docs' is '{home}/one/README.md', and this is '{home}/two/README.md': add it by its"
    status, out, err = ran("add", "docs", ".", "--prune")
    assert (status, out) == (0, "0 added, 0 updated, 0 unchanged, 1 left out; 0 texts embedded\n")
    assert err.startswith(f"left out: {why} absolute path")
    status, _, err = ran("add", "docs", "README.md")
    assert status == 2
    assert why in err
    assert ran("add", "docs", f"{home}/two")[0] == 0
    assert sources(ran) == [f"{home}/two/README.md", "README.md"]
    # A project that was moved takes its names along.
    (home / "one").rename(home / "moved")
    monkeypatch.chdir(home / "moved")
    assert ran("add", "docs", ".")[1] == "0 added, 1 updated, 0 unchanged; 0 texts embedded\n"


def test_pruning_standard_input_concerns_no_other_document(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ran("create", "docs", "--embedding", "none")
    for name in ("s1.txt", "s2.txt", "s2.txt"):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"some text of " + name.encode())))
        assert "removed" not in ran("add", "docs", "-", "--as", name, "--prune")[1]
    assert sources(ran) == ["s1.txt", "s2.txt"]


def test_links_that_lead_out_of_a_folder_are_left_out_and_a_file_that_is_named_is_followed(ran: Run) -> None:
    for name in ("secret/key.md", "docs/a.md", "docs/.env"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("text of " + name)
    Path("docs/out.md").symlink_to("../secret/key.md")
    Path("docs/hidden.md").symlink_to(".env")
    Path("docs/in.md").symlink_to("a.md")
    Path("docs/folder").symlink_to("../secret", target_is_directory=True)
    Path("way").symlink_to("docs", target_is_directory=True)
    for asked in ("docs", "way", "docs/*.md", "docs/*/*.md"):
        given = list(read([asked]))
        taken = {Path(one.name).name for one in given if isinstance(one, Original)}
        assert taken == ({"a.md", "in.md"} if asked != "docs/*/*.md" else set())
        left = {Path(one.name).name for one in given if isinstance(one, LeftOut)}
        assert left == ({"out.md", "hidden.md"} if asked != "docs/*/*.md" else {"key.md"})
    ran("create", "docs", "--embedding", "none")
    status, out, err = ran("add", "docs", "docs")
    assert (status, out) == (0, "2 added, 0 updated, 0 unchanged, 2 left out; 0 texts embedded\n")
    assert "left out: 'docs/out.md' is a link that leads out of 'docs', or to what is hidden there\n" in err
    assert ran("add", "docs", "docs", "docs/*.md", "docs/out.md")[1] == (
        "1 added, 0 updated, 2 unchanged, 2 left out; 0 texts embedded\n"
    )
    assert "docs/out.md" in sources(ran)


def test_what_cannot_be_read_in_its_encoding_or_has_no_name_is_left_out(ran: Run) -> None:
    write(a="one text")
    Path("docs/latin.txt").write_bytes("Grüße".encode("latin-1"))
    Path("docs/empty.html").write_text("<html><body></body></html>")
    Path(os.fsdecode(b"docs/n\xe4me.md")).write_text("text")
    ran("create", "docs", "--embedding", "none")
    added = json.loads(ran("add", "docs", "docs", "--json")[1])
    assert added["added"] == 1
    assert [(one["name"], one["why"].split(":")[0]) for one in added["left_out"]] == [
        ("docs/empty.html", "'docs/empty.html' has no text"),
        ("docs/latin.txt", "'docs/latin.txt' is not UTF-8"),
        (r"docs/n\udce4me.md", r"'docs/n\udce4me.md' has a name that is not UTF-8"),
    ]


def test_standard_input_is_a_document_with_a_name(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ran("create", "docs", "--embedding", "none")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"# Notes\n\nfrom a pipe")))
    assert ran("add", "docs", "-", "--as", "notes.md")[1] == "1 added, 0 updated, 0 unchanged; 0 texts embedded\n"
    assert ran("search", "docs", "pipe")[1].startswith("1.000  notes.md:1-3  Notes\n")


def test_what_cannot_be_read_is_left_out_and_named(ran: Run) -> None:
    write(a="text")
    Path("docs/b.bin").write_bytes(b"\0\1\2")
    ran("create", "docs", "--embedding", "none")
    assert ran("add", "docs", "docs") == (
        0,
        "1 added, 0 updated, 0 unchanged, 1 left out; 0 texts embedded\n",
        "left out: 'docs/b.bin' is no text: leave it out, or convert it first\n",
    )
    assert ran("add", "docs", "docs/b.bin")[0] == 2


def test_a_terminal_is_shown_a_bar_and_is_not_steered_by_documents(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write(a="evil \x1b[2J\x1b]0;title\x07 text " + "and more " * 60)
    ran("create", "docs", "--embedding", "none")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert "100%" in ran("add", "docs", "docs")[2]
    out = ran("search", "docs", "evil")[1]
    assert "\x1b" not in out
    assert "evil \\x1b[2J" in out
    assert "…" in out


def test_a_providers_model_is_asked_with_the_key_of_the_environment(ran: Run) -> None:
    write(cats="# Cats\n\nThe cat purrs.", dogs="# Dogs\n\nThe dog barks.")
    busy = {"match": {"endpoint": "embeddings"}, "times": 1, "fail": 429, "retry_after": 0.01}
    with ModelServer({"rules": [busy]}) as server, environment(server.environ):
        assert "openai/text-embedding-3-small (a provider's model" in ran("create", "pets")[1]
        assert ran("add", "pets", "docs")[1] == "2 added, 0 updated, 0 unchanged; 2 texts embedded\n"
        assert ran("search", "pets", "the cat purrs", "--mode", "vector", "--top-k", "1")[1].startswith("0.")
        assert [(call.question.model, len(call.question.texts)) for call in server.asked] == [
            # Once more after "slow down".
            ("text-embedding-3-small", 2),
            ("text-embedding-3-small", 2),
            ("text-embedding-3-small", 1),
        ]
    with (
        ModelServer({"rules": [{"match": {"endpoint": "embeddings"}, "fail": 401}]}) as server,
        environment(server.environ),
    ):
        status, _, err = ran("search", "pets", "the cat purrs")
        assert status == 2
        assert "model 'openai/text-embedding-3-small' has no key that works: set its provider's key in the " in err
        assert "environment it is asked from, in a run the worker's (" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "Bad"], "'Bad' cannot be the name of an index"),
        (["create", "x", "--embedding", "lexcal"], "'lexcal' is no embedder (did you mean 'lexical'?)"),
        (["create", "docs"], "index 'docs' is there already: drop it, or take another name"),
        (["add", "docs", "nowhere"], "'nowhere': there is no such file or folder, and as a pattern it matches nothing"),
        (["add", "docs", "*.nothing"], "'*.nothing': there is no such file"),
        (["add", "docs", "a.m"], "it matches nothing; what came from it earlier is taken out with --prune"),
        (["add", "docs", "a.m", "--prune"], "matches nothing, and nothing in index 'docs' is from there"),
        (["add", "docs", ""], "'' names no file or folder: write . for the current directory"),
        (["add", "docs", "a.md", "", "--prune"], "'' names no file or folder"),
        (["add", "docs"], "Missing argument"),
        (["add", "docs", ".", "-m", "x"], "--metadata 'x': write name=value"),
        (["add", "docs", ".", "-m", "=x"], "--metadata '=x': write name=value"),
        (["add", "docs", "a.md", "-m", "source=x"], "stands for the document's own name"),
        (["add", "dogs", "a.md"], "there is no index 'dogs' (did you mean 'docs'?)"),
        (["search", "docs", ""], "the query to index 'docs' is empty"),
        (["search", "docs", "x", "--mode", "vector"], "has no vectors"),
        (["search", "docs", "x", "--mode", "magic"], "'magic' is not one of"),
        (["search", "docs", "x", "--top-k", "0"], "top_k is 0: let it be a whole number from 1 to 100"),
        (["search", "docs", "x", "--top-k", "101"], "top_k is 101: let it be a whole number from 1 to 100"),
        (["search", "docs", "x", "--min-score", "2"], "min_score is 2.0: let it be a number from 0 to 1"),
        (["search", "docs", "x", "--min-score", "nan"], "min_score is nan: let it be a number from 0 to 1"),
        (["search", "docs", "x", "--diversity", "nan"], "diversity is nan: let it be a number from 0 to 1"),
        (["search", "docs", "x", "--filter", "x"], "--filter 'x': write name=value"),
        (["search", "dogs", "x"], "there is no index 'dogs' (did you mean 'docs'?)"),
        (["drop", "dogs"], "there is no index 'dogs'"),
    ],
)
def test_a_mistake_is_said_in_a_sentence_and_exits_with_2(ran: Run, arguments: list[str], said: str) -> None:
    ran("create", "docs", "--embedding", "none")
    Path("a.md").write_text("text")
    status, out, err = ran(*arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("foo", "FERRUM_INDEXES is not the URL of a store: write file:///path, postgresql://"),
        ("ftp://host", "FERRUM_INDEXES is not the URL of a store, and begins with 'ftp://': write file:///path"),
        ("file://{here}/a.md", "/a.md' is no directory: name another with FERRUM_INDEXES"),
        ("file://{here}/a.md/indexes", "/a.md' is no directory: name another with FERRUM_INDEXES"),
    ],
)
def test_what_names_no_store_is_refused_and_not_taken_for_an_empty_one(ran: Run, url: str, said: str) -> None:
    Path("a.md").write_text("text")
    with environment({"FERRUM_INDEXES": url.format(here=Path.cwd())}):
        status, out, err = ran("list")
    assert (status, out) == (2, "")
    assert said in err


def overwritten(file: Path) -> None:
    file.write_bytes(b"no database" + file.read_bytes()[11:])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:10_000])


@pytest.mark.parametrize("broken", [overwritten, emptied, cut_off, Path.unlink])
def test_an_index_whose_file_is_broken_is_named_and_can_be_dropped_while_the_others_go_on(
    ran: Run, tmp_path: Path, broken: Callable[[Path], object]
) -> None:
    write(cats="# Cats\n\nThe cat purrs.")
    ran("create", "bad", "--embedding", "none")
    (file,) = tmp_path.glob("home/indexes/*/*.db")
    for name in ("good", "other"):
        ran("create", name, "--embedding", "none")
        ran("add", name, "docs")
    broken(file)
    cure = "restore the file, or drop the index with 'ferrum index drop bad' and fill a new one\n"
    status, out, err = ran("list")
    assert (status, [line.split()[0] for line in out.splitlines()]) == (0, ["good", "other"])
    assert err.startswith("index 'bad' ")
    assert err.endswith(cure)
    assert [one["name"] for one in json.loads(ran("list", "--json")[1])] == ["good", "other", "bad"]
    assert json.loads(ran("list", "--json")[1])[-1]["unreadable"] + "\n" == err
    for asked in (("add", "bad", "docs"), ("search", "bad", "cat")):
        status, _, err = ran(*asked)
        assert status != 0
        assert "index 'bad' " in err
        assert err.endswith(cure)
    assert "is there already: drop it" in ran("create", "bad", "--embedding", "none")[2]
    assert ran("search", "good", "cat")[1].startswith("1.000")
    assert ran("drop", "bad") == (0, "dropped bad\n", "")
    assert "there is no index 'bad'" in ran("drop", "bad")[2]
    assert "create" not in ran("drop", "bad")[2]
    assert ran("create", "bad", "--embedding", "none")[0] == 0
    assert ran("add", "bad", "docs")[0] == 0


def test_values_on_the_command_line_are_what_json_would_call_them() -> None:
    assert pairs("-m", ["a=1", "b=1.10", "c=true", "d=null", "e=x=y", "f=", "g=NaN", "h=1.5", "i=[1]", "a=two"]) == {
        "a": [1, "two"],
        "b": "1.10",
        "c": True,
        "d": None,
        "e": "x=y",
        "f": "",
        "g": "NaN",
        "h": 1.5,
        "i": "[1]",
    }


# What is read.


def test_folders_are_read_without_what_is_hidden_or_made_by_tools(ran: Run) -> None:
    for name in ("b.md", "a.md", ".hidden.md", ".git/config", "node_modules/x.md", "sub/c.md", "sub/__pycache__/x.pyc"):
        path = Path("docs", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    Path("docs/loop").symlink_to(".", target_is_directory=True)
    Path("docs/nowhere").symlink_to("not-there")
    given = list(read(["docs"], metadata={"k": 1}))
    assert [one.name for one in given] == ["docs/a.md", "docs/b.md", "docs/nowhere", "docs/sub/c.md"]
    assert [one.why for one in given if isinstance(one, LeftOut)] == ["'docs/nowhere' is a link to what is not there"]
    assert {one.origin for one in given} == {f"{Path.cwd()}/{one.name}" for one in given}
    assert {one.metadata["k"] for one in given if isinstance(one, Original)} == {1}
    assert documents.count(["docs", "-", "docs/**/*.md", f"{Path.cwd()}/*/b.[m]d"]) == 4 + 1 + 3 + 1


def test_a_pattern_reads_each_folder_once_however_often_it_says_any_depth(
    ran: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("top")
    for depth in range(12):
        folder = folder / f"d{depth}"
        (folder / "beside").mkdir(parents=True)
        (folder / "x").write_text("text")
    Path("top/d0/again").symlink_to(".", target_is_directory=True)
    Path("top/d0/beside/above").symlink_to("../..", target_is_directory=True)
    looked_at: list[str] = []
    look = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked_at.append(str(path)) or look(path))
    assert documents.count(["top/" + "**/" * 12 + "x"]) == 12
    assert documents.count(["top/" + "**/*/" * 12 + "x"]) == 1
    assert documents.count(["top/" + "**/" * 3 + "**"]) == 12
    assert max(looked_at.count(path) for path in looked_at) == 3


def test_a_file_that_was_named_has_to_be_readable(ran: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo("pipe")
    with pytest.raises(InputError, match="'pipe' is a pipe, and no file that can be read"):
        list(read(["pipe"]))
    Path("nowhere").symlink_to("not-there")
    with pytest.raises(InputError, match="'nowhere' is a link to what is not there"):
        list(read(["nowhere"]))
    monkeypatch.setattr(documents, "LARGEST", 10)
    Path("big.txt").write_text("x" * 11)
    with pytest.raises(InputError, match=r"'big\.txt' has more than 0 MiB"):
        list(read(["big.txt"]))
    with pytest.raises(InputError, match="'-' stands for standard input, and there is none"):
        list(read(["-"]))
