"""A Redis behind Sentinel, and one that is reached through TLS, each with real servers."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from fleet import PATIENCE_S, Fleet, ended, eventually, happened

import ferrum
from ferrum.errors import SettingsError
from ferrum.local.process import tied
from ferrum.local.redis import PrivateRedis, celery_url, find_server
from ferrum.results import RunStatus
from ferrum.sentinels import watched
from ferrum.settings import read
from ferrum.testing.environment import environment

QUICK = {"FERRUM_LEASE": "3", "FERRUM_HEARTBEAT": "0.3", "FERRUM_SWEEP": "0.2"}
ECHO = {"type": "task", "task": "user.echo", "input": {"value": 1}}

#: All that a run asks of Redis: a chain, a chord, and who waits for it.
FLOW = {
    "name": "behind",
    "steps": {
        "a": ECHO, "b": {**ECHO, "needs": ["a"]}, "c": {**ECHO, "needs": ["a"]}, "join": {**ECHO, "needs": ["b", "c"]},
        "each": {**ECHO, "for_each": [1, 2, 3]},
    },
}  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def runs_pass() -> None:
    """One is submitted, and one is sent as a message whose answer is waited for."""
    from ferrum.celery import app

    assert ended(ferrum.submit(FLOW)).status is RunStatus.COMPLETED
    answer = app.send_task("ferrum.run", [FLOW], queue="ferrum").get(timeout=PATIENCE_S)
    assert ended(answer["run_id"]).status is RunStatus.COMPLETED


class Servers:
    """A master, its replica and a sentinel that watches them."""

    def __init__(self, folder: Path, stack: ExitStack, down_after_s: float) -> None:
        self.servers: list[PrivateRedis] = []
        for number in range(2):
            home = folder / f"redis-{number}"
            (home / "redis").mkdir(parents=True, mode=0o700)
            home.chmod(0o700)
            if self.servers:
                (home / "redis" / "password").write_text(self.password)
            server = PrivateRedis(home, port=free_port()).start()
            stack.callback(server.kill)
            self.servers.append(server)
        ports = [urlsplit(server.url).port for server in self.servers]
        for number, server in enumerate(self.servers):
            with redis.Redis.from_url(server.url) as client:
                client.config_set("masterauth", self.password)
                client.config_set("repl-diskless-sync-delay", 0)
                if number:
                    client.replicaof("127.0.0.1", str(ports[0]))
                    eventually(lambda client=client: client.info("replication")["master_link_status"] == "up")
        self.port = free_port()
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {self.port}\nbind 127.0.0.1\nrequirepass watching\nsentinel monitor main 127.0.0.1 {ports[0]} 1\n"
            f"sentinel auth-pass main {self.password}\nsentinel failover-timeout main 4000\n"
            f"sentinel down-after-milliseconds main {round(1000 * down_after_s)}\n"
            "sentinel parallel-syncs main 1\n"
        )
        with (folder / "sentinel.log").open("wb") as log:
            command = tied([str(find_server().binary), str(config), "--sentinel"])
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)
        self.sentinel: Any = stack.enter_context(
            redis.Redis(port=self.port, password="watching", decode_responses=True)
        )
        eventually(self._knows_both)

    @property
    def password(self) -> str:
        return urlsplit(self.servers[0].url).password or ""

    @property
    def url(self) -> str:
        # The first is not there: another one is asked.
        places = f"127.0.0.1:{free_port()},127.0.0.1:{self.port}"
        return f"sentinel://:{self.password}@{places}/main?sentinel_password=watching"

    def _knows_both(self) -> bool:
        with suppress(redis.exceptions.RedisError):
            return bool(self.sentinel.execute_command("SENTINEL", "REPLICAS", "main"))
        return False

    def master(self) -> int:
        return int(self.sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")[1])


@pytest.mark.parametrize("planned", [True, False], ids=["the old master lives on", "the master is killed"])
def test_behind_sentinel_runs_pass_before_amid_and_after_a_failover(
    planned: bool, redis_url: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        # A machine that is slow for a moment is no dead master where one is changed by hand.
        servers = Servers(tmp_path, stack, down_after_s=60 if planned else 1)
        stack.enter_context(environment({"FERRUM_REDIS_URL": servers.url}))
        fleet = Fleet(servers.url, tmp_path, QUICK)
        stack.callback(fleet.stop)
        worker = fleet.start("-c", "4")
        runs_pass()
        log = tmp_path / "effects"
        work = {"type": "task", "task": "user.effects", "input": {"log": str(log), "every_s": 0.1, "count": 30}}
        # Held by a step that only the keeper renews, and by one that waits.
        hold = {"type": "task", "task": "user.hold", "input": {"log": str(tmp_path / "held"), "seconds": 4}}
        run_id = ferrum.submit({"name": "amid", "steps": {"a": work, "b": {**ECHO, "needs": ["a"]}, "hold": hold}})
        eventually(lambda: len(happened(run_id, "step.started")) == 2)
        first = servers.master()
        if planned:
            servers.sentinel.execute_command("SENTINEL", "FAILOVER", "main", "COORDINATED")
        else:
            servers.servers[0].kill()
        eventually(lambda: servers.master() != first)
        assert ended(run_id).status is RunStatus.COMPLETED
        runs_pass()
        assert worker.poll() is None


def test_the_url_of_sentinels_is_read_whole_or_refused() -> None:
    found = watched("sentinel://ann:p%40w@a:1,[::1]:2,c/m%2Fn/3?sentinel_username=s&sentinel_password=t")
    assert found is not None
    assert found.sentinels == (("a", 1), ("::1", 2), ("c", 26379))
    assert (found.master, found.db, found.username, found.password) == ("m/n", 3, "ann", "p@w")
    assert (found.sentinel_username, found.sentinel_password) == ("s", "t")
    assert "p@w" not in repr(found)
    assert watched("redis://h") is None
    assert celery_url("sentinel://:pw@[::1],b:2/m/3") == "sentinel://:pw@[::1]:26379/3"
    assert celery_url("sentinel://a:1/m") == "sentinel://a:1/0"
    for wrong in (
        "sentinel://h:1",
        "sentinel://:1/m",
        "sentinel://h/m/x",
        "sentinel://h:99999/m",
        "sentinel://h/m?x=1",
    ):
        with pytest.raises(SettingsError, match="is no URL of a Redis"):
            read({"FERRUM_REDIS_URL": wrong})


@contextmanager
def secured(server: PrivateRedis, folder: Path) -> Iterator[str]:
    """A door with TLS before a Redis; the URL of it."""
    authority, certificate, key = certified(folder)
    parts = urlsplit(server.url)
    door = Path(__file__).parent / "tls_door.py"
    command = tied([sys.executable, "-I", str(door), str(certificate), str(key), str(parts.hostname), str(parts.port)])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        options = f"ssl_cert_reqs=required&ssl_ca_certs={authority}"
        try:
            yield f"rediss://:{parts.password}@127.0.0.1:{int(process.stdout.readline())}/0?{options}"
        finally:
            process.kill()


def certified(folder: Path) -> tuple[Path, Path, Path]:
    """An authority of our own, and the certificate and key of 127.0.0.1 by it."""
    x509 = pytest.importorskip("cryptography.x509", reason="no package to make certificates with")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name(text: str) -> Any:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)

    def signed(subject: str, key: Any, by: Any, *more: tuple[Any, bool]) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
        )
        for extension, critical in more:
            builder = builder.add_extension(extension, critical)
        return bytes(builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    above, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    paths = folder / "authority.pem", folder / "server.pem", folder / "server.key"
    paths[0].write_bytes(
        signed("authority", above, above, (x509.BasicConstraints(ca=True, path_length=None), True), (usage, True))
    )
    place = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    paths[1].write_bytes(signed("127.0.0.1", key, above, (place, False)))
    paths[2].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )  # fmt: skip
    return paths


def test_through_tls_runs_pass_and_steps_that_hold_the_interpreter_are_kept(redis_url: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(PrivateRedis(tmp_path / "home", port=free_port()))
        url = stack.enter_context(secured(server, tmp_path))
        stack.enter_context(environment({"FERRUM_REDIS_URL": url}))
        fleet = Fleet(url, tmp_path, {**QUICK, "FERRUM_LEASE": "2"})
        stack.callback(fleet.stop)
        fleet.start("-c", "4")
        runs_pass()
        hold = {"type": "task", "task": "user.hold", "input": {"log": str(tmp_path / "held"), "seconds": 4}}
        run_id = ferrum.submit({"name": "held", "steps": {"a": hold}})
        assert ended(run_id).status is RunStatus.COMPLETED
        assert not happened(run_id, "step.lost")


def test_a_certificate_of_a_stranger_is_not_believed(redis_url: str, tmp_path: Path) -> None:
    from ferrum.errors import Unavailable

    with ExitStack() as stack:
        server = stack.enter_context(PrivateRedis(tmp_path / "home", port=free_port()))
        url = stack.enter_context(secured(server, tmp_path))
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        url = url.replace(str(tmp_path / "authority.pem"), str(certified(stranger)[0]))
        stack.enter_context(environment({"FERRUM_REDIS_URL": url}))
        with pytest.raises(Unavailable):
            ferrum.submit(FLOW)
