"""What code in a sandbox must not be able to do, as root and as an ordinary user.

Each attack is run twice: against the sandbox, which holds, and against one that lacks the defence, which does not. So
no test here can pass because of a typing error in an attack.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import weakened
from attacks import ATTACKS, Attack, numbers, program
from weakened import Without

from ferrum.governance.acts import CodeReply, CodeRun, WhyEnded
from ferrum.sandbox.reach import Reach
from ferrum.sandbox.runtimes import basic

ROOT = Path(__file__).parent.parent
ORDINARY = 12345
MARK = "the-worker's-secret"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NO SANDBOX IS TESTED HERE: it is not Linux")


@pytest.fixture(scope="module", autouse=True)
def sandbox() -> None:
    weakened.needed()


@pytest.fixture(scope="module")
def host() -> Iterator[dict[str, str]]:
    """What there is on the host to be reached, and is reachable for everyone on it."""
    directory = Path(tempfile.mkdtemp(prefix="ferrum-host-", dir="/var/tmp"))
    directory.chmod(0o755)
    (directory / "secret").write_text("secret")
    by_path, by_port, abstract = socket.socket(socket.AF_UNIX), socket.socket(), socket.socket(socket.AF_UNIX)
    by_path.bind(str(directory / "socket"))
    (directory / "socket").chmod(0o777)
    by_port.bind(("127.0.0.1", 0))
    name = f"ferrum-test-{os.getpid()}"
    abstract.bind(f"\0{name}")
    for listening in (by_path, by_port, abstract):
        listening.listen(64)
    try:
        yield {
            "HOST_FILE": str(directory / "secret"),
            "HOST_SOCKET": str(directory / "socket"),
            "HOST_PORT": str(by_port.getsockname()[1]),
            "HOST_ABSTRACT": name,
            "NUMBERS": numbers(),
            "MARK": MARK[::-1],
        }
    finally:
        for listening in (by_path, by_port, abstract):
            listening.close()
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def results(host: dict[str, str]) -> dict[Attack, tuple[bool, bool]]:
    """Whether each attack got through the sandbox, and through the one without its defence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FERRUM_TEST_MARK", MARK)
        attacks = [attack for attack in ATTACKS if not attack.only_root or os.geteuid() == 0]
        held = _run(attacks, Without(), host)
        weak: dict[str, bool] = {}
        for without, some in _grouped(attacks).items():
            weak |= _run(some, without, host)
    return {attack: (held[attack.name], weak[attack.name]) for attack in attacks}


def _grouped(attacks: list[Attack]) -> dict[Without, list[Attack]]:
    """By what is taken out; whoever lacks only a system call or two lacks all of these together."""
    calls = tuple(
        sorted(
            {name for one in attacks if one.without == Without(calls=one.without.calls) for name in one.without.calls}
        )
    )
    groups = defaultdict(list)
    for one in attacks:
        groups[Without(calls=calls) if one.without == Without(calls=one.without.calls) else one.without].append(one)
    return groups


def _run(attacks: list[Attack], without: Without, env: dict[str, str]) -> dict[str, bool]:
    reply = weakened.run(CodeRun(code=program(attacks), env=env, timeout_s=60), without)
    assert reply.reason is WhyEnded.OK, f"{reply.detail}\n{reply.stderr}"
    assert isinstance(reply.output, dict)
    return {name: bool(value) for name, value in reply.output.items()}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_it_cannot(attack: Attack, results: dict[Attack, tuple[bool, bool]]) -> None:
    if attack not in results:
        pytest.skip("only a root worker could be harmed by this")
    held, weak = results[attack]
    assert not held
    assert weak, "it does not get through without its defence either: the attack is no test"
