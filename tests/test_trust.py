"""Files that are found by their names are believed once a person has seen them; a home, where nobody else wrote it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fleet import PATIENCE_S, Fleet, eventually
from preloading import into

from ferrum import cli
from ferrum.errors import SettingsError, Unavailable
from ferrum.governance.policy import load_policy
from ferrum.local.home import own
from ferrum.local.redis import running
from ferrum.local.trust import find, untrusted
from ferrum.mcp.specs import load_servers
from ferrum.settings import Settings
from ferrum.testing.environment import environment

SERVERS = "servers: {git: {command: sh, args: ['-c', 'echo pwned >&2']}}\n"
POLICY = "allow: ['tool:*']\n"

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that we stand in, with both files."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "ferrum.policy.yaml").write_text(POLICY)
    (place / "ferrum.servers.yaml").write_text(SERVERS)
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def trusted(place: Path, settings: Settings) -> None:
    for found in find(place):
        found.trust(settings.home)


def test_a_file_that_was_only_found_is_an_error_that_says_what_to_do(place: Path, settings: Settings) -> None:
    said = f"ferrum trust {place}', or name it with FERRUM_POLICY"
    with pytest.raises(SettingsError, match=said):
        load_policy(settings)
    with pytest.raises(SettingsError, match="or name it with FERRUM_SERVERS"):
        load_servers(settings, {})
    assert [found.path.name for found in untrusted(settings)] == ["ferrum.policy.yaml", "ferrum.servers.yaml"]


def test_a_file_that_a_setting_names_is_believed(place: Path, settings: Settings) -> None:
    named = settings.model_copy(update={"policy": Path("ferrum.policy.yaml"), "servers": Path("ferrum.servers.yaml")})
    assert load_policy(named).rules
    assert load_servers(named, {})
    assert list(untrusted(named)) == []
    as_json = settings.model_copy(update={"mcp_servers": "{}"})
    assert load_servers(as_json, {}) == {}
    assert [found.path.name for found in untrusted(as_json)] == ["ferrum.policy.yaml"]


def test_a_file_is_trusted_as_it_is_and_where_it_is(place: Path, settings: Settings) -> None:
    trusted(place, settings)
    assert load_policy(settings).rules
    assert load_servers(settings, {})["git"].command == "sh"
    servers = place / "ferrum.servers.yaml"
    servers.write_text(SERVERS.replace("pwned", "again"))
    with pytest.raises(SettingsError, match=r"ferrum\.servers\.yaml was found by its name"):
        load_servers(settings, {})
    # As it was is as it was.
    servers.write_text(SERVERS)
    assert load_servers(settings, {})
    elsewhere = place.parent / "elsewhere"
    shutil.copytree(place, elsewhere)
    os.chdir(elsewhere)
    with pytest.raises(SettingsError, match="was found by its name"):
        load_policy(settings)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "is not a file"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: path.write_bytes(b"#" * (2**20 + 1)), "is larger than 1,048,576 bytes"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
    ],
)  # fmt: skip
def test_what_has_that_name_and_is_no_such_file_is_refused_at_once(
    place: Path, settings: Settings, make: object, said: str
) -> None:
    (place / "ferrum.policy.yaml").unlink()
    make(place / "ferrum.policy.yaml")  # type: ignore[operator]
    with pytest.raises(SettingsError, match=said):
        load_policy(settings)


def test_trusting_shows_what_is_trusted(place: Path, settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with (place / "ferrum.policy.yaml").open("a") as policy:
        policy.write("# \x1b]52;c;cm0gLXJmIC8=\x07 \u202e\n")
    with environment({"FERRUM_HOME": str(settings.home)}):
        assert cli.status_of(["trust", "."]) == 0
        said = capsys.readouterr().out
        assert cli.status_of(["trust", "--json", str(place)]) == 0
        as_json = json.loads(capsys.readouterr().out)
    assert "allow: ['tool:*']" in said
    assert "command: sh" in said
    assert not {"\x1b", "\x07", "\u202e"} & set(said)
    assert said.endswith("trusted as they are now: ferrum.policy.yaml, ferrum.servers.yaml\n")
    assert [one["path"] for one in as_json["trusted"]] == [str(found.path) for found in find(place)]
    assert list(untrusted(settings)) == []


def test_where_nothing_has_to_be_trusted_it_says_so(
    tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    with environment({"FERRUM_HOME": str(settings.home)}):
        assert cli.status_of(["trust", str(tmp_path)]) == 0
    assert "nothing in" in capsys.readouterr().out
    assert not settings.home.exists()


def _called(place: Path, home: Path, *arguments: str, stdin: int = subprocess.DEVNULL, err: int = subprocess.PIPE) -> (
    subprocess.CompletedProcess[str]
):  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FERRUM_", "REDIS_URL"))}
    return subprocess.run(
        [sys.executable, "-m", "ferrum", *arguments],
        env=into({**kept, "FERRUM_HOME": str(home), "FERRUM_WARM": "false", "FERRUM_EXIT_WHEN_IDLE": "1"}),
        cwd=place, stdin=stdin, stdout=subprocess.PIPE, stderr=err, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


def test_a_run_asks_on_a_terminal_once_and_without_one_starts_nothing(place: Path, settings: Settings) -> None:
    (place / "w.yaml").write_text(
        json.dumps({"name": "x", "steps": {"a": {"type": "artifact", "name": "a.md", "content": "x"}}})
    )
    refused = _called(place, settings.home, "run", "w.yaml")
    assert refused.returncode == 2
    assert "ferrum trust" in refused.stderr
    assert not settings.home.exists()

    ours, theirs = pty.openpty()
    os.write(ours, b"y\ny\n")
    asked = _called(place, settings.home, "run", "w.yaml", stdin=theirs, err=theirs)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert asked.returncode == 0, asked.stdout + shown
    assert shown.count("Trust it as it is now?") == 2
    assert "command: sh" in shown
    again = _called(place, settings.home, "run", "w.yaml")
    assert (again.returncode, again.stderr) == (0, "")
    eventually(lambda: running(settings.home) is None)


def test_a_no_starts_nothing(place: Path, settings: Settings) -> None:
    (place / "w.yaml").write_text(
        json.dumps({"name": "x", "steps": {"a": {"type": "artifact", "name": "a.md", "content": "x"}}})
    )
    ours, theirs = pty.openpty()
    os.write(ours, b"\n")
    refused = _called(place, settings.home, "run", "w.yaml", stdin=theirs, err=theirs)
    os.close(theirs)
    os.close(ours)
    assert refused.returncode == 2
    assert not settings.home.exists()


def test_a_worker_does_not_start_on_a_policy_that_nobody_has_trusted(redis_url: str, tmp_path: Path) -> None:
    fleet = Fleet(redis_url, tmp_path, {"FERRUM_POLICY": ""})
    (tmp_path / "ferrum.policy.yaml").write_text(POLICY)
    with pytest.raises(AssertionError, match=r"ferrum trust .*, or name it with FERRUM_POLICY"):
        fleet.start()
    fleet.stop()


# The home.


def test_a_home_is_made_for_us_alone(tmp_path: Path) -> None:
    home = own(tmp_path / "a" / "home", make=True)
    assert home.stat().st_mode & 0o777 == 0o700
    assert own(tmp_path / "nowhere") == tmp_path / "nowhere"


def _open_to_all(home: Path) -> None:
    home.chmod(0o777)


def _sticky(home: Path) -> None:
    home.chmod(0o1777)


def _below_open_to_all(home: Path) -> None:
    home.parent.chmod(0o777)


def _of_a_group(home: Path) -> None:
    os.chown(home, -1, 12345)
    home.chmod(0o770)


def _planted(home: Path) -> None:
    os.chown(home, 12345, -1)


def _below_someone_elses(home: Path) -> None:
    os.chown(home.parent, 12345, -1)


def _link_of_someone_else(home: Path) -> None:
    home.rename(home.parent.parent / "real")
    home.symlink_to(home.parent.parent / "real")
    os.chown(home, 12345, -1, follow_symlinks=False)


def _link_to_open(home: Path) -> None:
    real = home.parent.parent / "real"
    home.rename(real)
    real.chmod(0o777)
    home.symlink_to(real)


def _link_by_way_of_open(home: Path) -> None:
    """Others may let the link lead elsewhere, though it leads to a place of ours now."""
    real, way = home.parent.parent / "real", home.parent.parent / "way"
    home.rename(real)
    way.mkdir()
    way.chmod(0o777)
    (way / "on").symlink_to(real)
    home.symlink_to(Path("..", "way", "on"))


def _link_to_itself(home: Path) -> None:
    home.rename(home.parent / "real")
    home.symlink_to(home)


@root
@pytest.mark.parametrize(
    "spoil",
    [
        _open_to_all, _sticky, _below_open_to_all, _of_a_group, _planted, _below_someone_elses,
        _link_of_someone_else, _link_to_open, _link_by_way_of_open, _link_to_itself,
    ],
)  # fmt: skip
def test_a_home_that_others_may_have_written_is_refused(tmp_path: Path, spoil: object) -> None:
    home = tmp_path / "shared" / "home"
    home.mkdir(mode=0o700, parents=True)
    (home / "redis.json").write_text(json.dumps({"url": "redis://evil.example.org"}))
    spoil(home)  # type: ignore[operator]
    with pytest.raises(Unavailable, match=r"the home .* cannot be trusted: .*FERRUM_HOME"):
        running(home)
    done = _called(tmp_path, home, "runs", "list")
    assert done.returncode == 2
    assert "cannot be trusted" in done.stderr


@root
@pytest.mark.parametrize("spoil", [lambda file: file.chmod(0o666), lambda file: os.chown(file, 12345, -1)])
def test_a_state_file_that_others_may_have_written_is_refused(tmp_path: Path, spoil: object) -> None:
    (tmp_path / "redis.json").write_text(json.dumps({"url": "redis://evil.example.org"}))
    spoil(tmp_path / "redis.json")  # type: ignore[operator]
    with pytest.raises(Unavailable, match=r"redis\.json cannot be trusted: others own it or may write to it"):
        running(tmp_path)


def test_a_home_below_a_place_that_is_sticky_is_ours(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    assert own(tmp_path / "tmp" / "home", make=True) == tmp_path / "tmp" / "home"


def test_marks_that_others_may_give_another_name_are_no_trust(place: Path, settings: Settings) -> None:
    trusted(place, settings)
    (settings.home / "trusted").chmod(0o777)
    with pytest.raises(Unavailable, match=r"trusted' cannot be trusted: others may write to"):
        load_policy(settings)


@root
def test_trust_that_someone_else_put_there_is_none(place: Path, settings: Settings) -> None:
    trusted(place, settings)
    os.chown(settings.home / "trusted", 12345, -1)
    for mark in (settings.home / "trusted").iterdir():
        os.chown(mark, 12345, -1)
    with pytest.raises(Unavailable, match="cannot be trusted"):
        load_policy(settings)
