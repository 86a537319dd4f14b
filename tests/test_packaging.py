"""What is installed is what was locked, from nowhere in particular, and importing it costs little."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent

#: A `.pth` file runs at every start of Python; malware came that way (litellm 1.82.7).
KNOWN_PTH = {"_editable_impl_ferrum.pth", "a1_coverage.pth", "_virtualenv.pth", "distutils-precedence.pth"}

PIN = re.compile(r"([a-z0-9-]+)==([^\s;]+)( ; [^\\/:]+)? \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
VIA = re.compile(r"    #(?: via)? +(ferrum \(pyproject\.toml(?::\w+)?\)|[A-Za-z0-9._-]+(?:\[[\w,-]+\])?)|    # via")


@cache
def lock_lines() -> tuple[str, ...]:
    return tuple((ROOT / "requirements.lock").read_text().splitlines())


@cache
def locked() -> dict[str, list[Version]]:
    """Every locked version of every package: with markers there may be several."""
    pins: dict[str, list[Version]] = {}
    for line in lock_lines():
        if pin := PIN.fullmatch(line):
            pins.setdefault(pin[1], []).append(Version(pin[2]))
    return pins


def wanted() -> list[Requirement]:
    """What pyproject.toml asks for, extras and the group of the developers included."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = document["project"]
    extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
    return [Requirement(line) for line in [*project["dependencies"], *extras, *document["dependency-groups"]["dev"]]]


def test_the_lock_is_in_step_with_pyproject() -> None:
    """`make lock` where this fails."""
    unmet = [
        str(want)
        for want in wanted()
        if not any(want.specifier.contains(version) for version in locked().get(canonicalize_name(want.name), []))
    ]
    assert unmet == []


def test_the_lock_holds_nothing_that_pyproject_no_longer_asks_for() -> None:
    asked, package = set(), ""
    for line in lock_lines():
        if pin := PIN.fullmatch(line):
            package = pin[1]
        elif "ferrum (pyproject.toml" in line:
            asked.add(package)
    assert asked == {canonicalize_name(want.name) for want in wanted()}


def test_the_lock_names_no_address_no_index_and_no_path() -> None:
    strange = [
        line for line in lock_lines() if not (PIN.fullmatch(line) or HASH.fullmatch(line) or VIA.fullmatch(line))
    ]
    assert strange == []


def test_the_lock_has_hashes_for_every_package() -> None:
    pins = [number for number, line in enumerate(lock_lines()) if PIN.fullmatch(line)]
    assert pins
    assert all(HASH.fullmatch(lock_lines()[number + 1]) for number in pins)


def test_the_lock_holds_no_version_that_carried_malware() -> None:
    assert not set(locked()["litellm"]) & {Version("1.82.7"), Version("1.82.8")}


def test_uv_trusts_the_certificates_of_the_machine() -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "MAKE"))}
    command = ["make", "-s", "--eval=show: ; @env", "show"]
    said = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout
    assert {"UV_SYSTEM_CERTS=1", "UV_NATIVE_TLS=1"} <= set(said.splitlines())


def test_nothing_unknown_runs_when_python_starts() -> None:
    site = Path(sysconfig.get_path("purelib"))
    assert {path.name for path in site.glob("*.pth")} - KNOWN_PTH == set()


@pytest.mark.parametrize("heavy", ["litellm", "mcp", "fastapi", "openai", "numpy"])
def test_importing_ferrum_does_not_import(heavy: str) -> None:
    script = f"import sys, ferrum; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_docker_compose_holds_no_secret_and_listens_on_the_loopback_only() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert set(services) == {"redis", "worker", "flower"}
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    secrets = [
        value
        for service in services.values()
        for name, value in service["environment"].items()
        if re.search("PASSWORD|AUTH|URL", name)
    ]
    assert len(secrets) == 4
    assert all(re.search(r"\$\{\w+_PASSWORD", secret) for secret in secrets)
