"""Put uv at the path given: the one on PATH, else from the index that this machine's pip knows.

A machine may have Python without pip or without ensurepip (Debian packs both apart), and a Python that nobody may
install into (PEP 668). So pip is looked for wherever it may be, wheels of other packages included, and installs into a
directory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

#: The first that knows every option in the Makefile.
OLDEST = (0, 8)
NEEDED = "uv>=0.9,<1"
#: Where systems keep the certificates that they trust, a company's own among them: Debian, Red Hat, Alpine and macOS.
BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
NO_PIP = "ferrum needs uv or pip, and this machine has neither: apt install python3-pip (or put uv on PATH)"


def main(target: Path) -> None:
    """Leave a uv at `target`, which is `bin/uv` of a directory that is ours."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    if not target.exists() and (there := shutil.which("uv")) and version(there) >= OLDEST:
        target.symlink_to(there)
    elif not target.exists():
        install(target.parent.parent)
    target.touch()


def version(uv: str) -> tuple[int, ...]:
    """Of a uv program; zeros for one that does not run."""
    try:
        told = subprocess.run([uv, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603
    except OSError:
        told = ""
    numbers = re.search(r"(\d+)\.(\d+)", told)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def install(directory: Path) -> None:
    """Raises `SystemExit` with what can be done where there is no pip, and with pip's own words where it fails."""
    # A user's wish for --user or for a virtual environment would contradict --target.
    env = {**trusted(), **os.environ, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_ROOT_USER_ACTION": "ignore"}
    options = ["install", "--quiet", "--upgrade", "--only-binary", ":all:", "--target", str(directory), NEEDED]
    for pip, path in pips():
        done = subprocess.run([*pip, *options], env={**env, **path}, check=False)  # noqa: S603
        if done.returncode:
            sys.exit(f"{' '.join(pip)} could not install uv: see above, or put uv on PATH")
        return
    sys.exit(NO_PIP)


def trusted() -> dict[str, str]:
    """Settings by which a pip before 24.2, which brings certificates of its own, trusts those of this machine.

    Not `PIP_CERT`, which would win over the user's own configuration of pip.
    """
    bundle = next((bundle for bundle in BUNDLES if Path(bundle).is_file()), None)
    return {"REQUESTS_CA_BUNDLE": bundle} if bundle else {}


def pips() -> Iterator[tuple[list[str], dict[str, str]]]:
    """Every pip of this machine, best first: its command and what its environment needs."""
    if find_spec("pip"):
        yield [sys.executable, "-m", "pip"], {}
    for wheel in sorted(wheels(), reverse=True):
        # A wheel of pip runs as it is.
        yield [sys.executable, "-m", "pip"], {"PYTHONPATH": str(wheel)}
    for name in ("python3", "python3.13", "python3.12", "python3.11", "/usr/bin/python3"):
        if (python := shutil.which(name)) and runs([python, "-m", "pip", "--version"]):
            yield [python, "-m", "pip"], {}
    for name in ("pip3", "pip"):
        if (pip := shutil.which(name)) and runs([pip, "--version"]):
            yield [pip], {}


def wheels() -> Iterator[Path]:
    """Wheels of pip that ensurepip or the distribution keeps."""
    ensurepip = find_spec("ensurepip")
    if ensurepip and ensurepip.origin:
        yield from Path(ensurepip.origin).parent.glob("_bundled/pip-*.whl")
    yield from Path(sysconfig.get_config_var("WHEEL_PKG_DIR") or "/usr/share/python-wheels").glob("pip-*.whl")


def runs(command: list[str]) -> bool:
    """Whether a command exists and succeeds."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603


if __name__ == "__main__":
    main(Path(sys.argv[1]))
