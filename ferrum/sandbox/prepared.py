"""Prepared runtimes: directories of packages, by name, made once by `ferrum sandbox build` and only ever read.

One is `<runtimes>/<abi>/<name>/<digest>`; the link `current` beside it says which one is in use. A build is made aside
and put in its place by a rename under a lock, so one that is killed or finds the disk full leaves what was there, and
two at once are one after the other.

Nothing of a package is run outside of a sandbox: wheels only, which are unpacked, and compiled without being imported.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import Distribution, PackageNotFoundError, PathDistribution, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel, ConfigDict, ValidationError

from ferrum.errors import AuthorError, NotFound, Unavailable, did_you_mean
from ferrum.local.home import own
from ferrum.sandbox.runtimes import BASIC, Runtime, basic
from ferrum.settings import Settings, redact

#: Where a sandbox has a runtime, and in it the packages.
_AT: Final = "/opt/runtime"
_SITE: Final = f"{_AT}/site"
#: Matplotlib wants a directory that it can write to, for what it finds out about fonts. What it found out when the
#: runtime was built is linked into it.
_FONTS_AT: Final = "/tmp/.matplotlib"  # noqa: S108 - in a sandbox, where it is nobody else's
_MATPLOTLIB: Final = (
    ("MPLBACKEND", "Agg"),
    ("MPLCONFIGDIR", _FONTS_AT),
    # The same fonts everywhere: its own.
    ("MPL_IGNORE_SYSTEM_FONTS", "1"),
)
_FIND_FONTS: Final = """
import pathlib, matplotlib.font_manager
for path in pathlib.Path(matplotlib.get_cachedir()).glob("*.json"):
    pathlib.Path("fonts").mkdir(exist_ok=True)
    pathlib.Path("fonts", path.name).write_bytes(path.read_bytes())
"""
#: Changes where a directory made by an older ferrum would not do.
_FORMAT: Final = 1
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MODULE: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_CREDENTIALS: Final = re.compile(r"://[^/@\s]+@")
#: What an installer needs of our environment; the keys of model providers are none of its business.
_FOR_INSTALLERS: Final = ("PIP_", "UV_", "SSL_CERT_", "XDG_", "LC_")
_ALSO_FOR_INSTALLERS: Final = frozenset(
    {
        "PATH",
        "HOME",
        "LANG",
        "TMPDIR",
        "NETRC",
        "REQUESTS_CA_BUNDLE",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
    }
)


@dataclass(frozen=True, slots=True)
class Ours:
    """A runtime that ships with ferrum: what it is asked for by, and what is imported before code comes."""

    asks: tuple[str, ...]
    imports: tuple[str, ...]

    def pinned(self, name: str) -> Path:
        """Its requirements, pinned and with hashes."""
        return Path(__file__).with_name(f"{name}.txt")


OURS: Final[Mapping[str, Ours]] = {
    "python-data": Ours(("numpy", "pandas", "matplotlib"), ("numpy", "pandas", "matplotlib.pyplot")),
}


@dataclass(frozen=True, slots=True)
class Built:
    """One runtime as it lies on the disk."""

    name: str
    directory: Path
    #: Changes with its content.
    digest: str
    #: Package to version.
    packages: Mapping[str, str]
    #: Modules that a waiting sandbox has imported already.
    imports: tuple[str, ...]

    @property
    def runtime(self) -> Runtime:
        """What a sandbox is made for."""
        return replace(
            basic(),
            name=self.name,
            placed=((str(self.directory), _AT),),
            paths=(_SITE,),
            warm=(*basic().warm, *self.imports),
            # The path is for an interpreter that the job starts; its own has it already.
            env=(("PYTHONPATH", _SITE), *(_MATPLOTLIB if "matplotlib" in self.packages else ())),
            links=tuple(
                (f"{_FONTS_AT}/{path.name}", f"{_AT}/fonts/{path.name}")
                for path in sorted(self.directory.glob("fonts/*.json"))
            ),
        )


class _Label(BaseModel):
    """What is written down beside the packages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    packages: dict[str, str]
    imports: tuple[str, ...]


Trial = Callable[[Runtime, str], Mapping[str, bytes]]
"""Runs a program in a runtime that is not in use yet; returns what it left in `fonts`, raises where it fails."""


def place(settings: Settings) -> Path:
    """Where this Python's runtimes are. An extension module built for another cannot be loaded."""
    top = settings.runtimes or own(settings.home) / "runtimes"
    return top.absolute() / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{_FORMAT}"


def find(name: str, settings: Settings) -> Runtime:
    """The runtime of that name. Raises `NotFound` with what to type where there is none."""
    return basic() if name == BASIC else _find(name, settings).runtime


def ready(name: str, settings: Settings, trial: Trial | None = None) -> Runtime:
    """`find`, but one of ours is built where what it consists of is installed beside ferrum (`ferrum[data]`).

    That takes some seconds, once, and no network.
    """
    try:
        return find(name, settings)
    except NotFound:
        if name not in OURS or not _installed(OURS[name].asks):
            raise
    return build(name, settings, trial=trial).runtime


def _find(name: str, settings: Settings) -> Built:
    if _NAME.fullmatch(name) and (found := _current(place(settings) / name)):
        return found
    if name in OURS:
        raise NotFound(f"the runtime {name!r} is not built on this machine: ferrum sandbox build {name}")
    known = {BASIC, *OURS, *(one.name for one in built(settings))}
    raise NotFound(
        f"there is no runtime {name!r}{did_you_mean(name, known)}; "
        "`ferrum sandbox list` shows all, `ferrum sandbox build NAME requirements.txt` makes one"
    )


def built(settings: Settings) -> tuple[Built, ...]:
    """Every runtime that was built here for this Python, by name."""
    top = place(settings)
    if not top.is_dir():
        return ()
    return tuple(found for path in sorted(top.iterdir()) if path.is_dir() and (found := _current(path)))


def build(
    name: str,
    settings: Settings,
    requirements: Path | None = None,
    imports: Iterable[str] = (),
    trial: Trial | None = None,
) -> Built:
    """Make a runtime, or make it anew, and put it in use.

    One of ours needs no requirements: it is made of what is installed beside ferrum, or else of pinned wheels. With
    `trial` it is used only after that has run in it. Raises `AuthorError` for a name or file that will not do and
    `Unavailable` where it cannot be made; what was in use before stays in use.
    """
    imports = _checked(name, requirements, tuple(imports))
    top = place(settings)
    try:
        _make_readable_directory(top)
        with _locked(top / f"{name}.lock"):
            return _build(top / name, requirements, imports, trial)
    except OSError as error:
        raise Unavailable(
            f"the runtime {name!r} cannot be built in {top}: {error.strerror or error}; "
            "FERRUM_RUNTIMES names another place"
        ) from error


def drop(name: str, settings: Settings) -> None:
    """Remove a runtime. Raises `NotFound` where there is none; code that runs in it now may miss its files."""
    if name == BASIC:
        raise AuthorError(f"{BASIC!r} is the standard library and cannot be dropped")
    _find(name, settings)
    top = place(settings)
    with _locked(top / f"{name}.lock"):
        (top / name / "current").unlink(missing_ok=True)
        shutil.rmtree(top / name, ignore_errors=True)


def _checked(name: str, requirements: Path | None, imports: tuple[str, ...]) -> tuple[str, ...]:
    if name == BASIC:
        raise AuthorError(f"{BASIC!r} is the standard library and needs no building")
    if not _NAME.fullmatch(name):
        raise AuthorError(
            f"{name!r} cannot name a runtime: a name has small letters, digits, '-', '.' and '_', at most 64 of them"
        )
    for module in imports:
        if not _MODULE.fullmatch(module):
            raise AuthorError(f"{module!r} is not the name of a module")
    if requirements is None and name not in OURS:
        raise AuthorError(
            f"{name!r} is not a runtime of ferrum's own{did_you_mean(name, OURS)}, so say what is in it: "
            f"ferrum sandbox build {name} requirements.txt"
        )
    if requirements is not None and not requirements.is_file():
        raise AuthorError(f"there is no file {str(requirements)!r}")
    return imports or (OURS[name].imports if requirements is None else ())


def _build(home: Path, requirements: Path | None, imports: tuple[str, ...], trial: Trial | None) -> Built:
    _make_readable_directory(home)
    # Whoever builds holds the lock, so these are of builds that died.
    for dead in home.glob(".building-*"):
        shutil.rmtree(dead, ignore_errors=True)
    parts = [] if requirements else _installed(OURS[home.name].asks)
    digest = _digest(parts, imports)
    if parts and (there := _current(home)) and there.digest == digest:
        return there
    aside = Path(tempfile.mkdtemp(prefix=".building-", dir=home))
    try:
        site = aside / "site"
        site.mkdir()
        if parts:
            for part in parts:
                _link(part, site)
        else:
            _install(requirements or OURS[home.name].pinned(home.name), site)
            parts = [PathDistribution(path) for path in sorted(site.glob("*.dist-info"))]
            digest = _digest(parts, imports)
        _compile(site)
        _tidy(aside)
        label = _Label(packages={canonicalize_name(one.name): one.version for one in parts}, imports=imports)
        _write(aside / "runtime.json", label.model_dump_json().encode())
        if trial:
            _try_out(Built(home.name, aside, digest, label.packages, imports), trial)
        if not (home / digest).is_dir():
            aside.rename(home / digest)
        _use(home, digest)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Built(home.name, home / digest, digest, label.packages, imports)


def _try_out(built: Built, trial: Trial) -> None:
    """Import in a sandbox what will be imported, and keep what that found out."""
    program = "".join(f"import {name}\n" for name in built.imports)
    kept = trial(built.runtime, program + (_FIND_FONTS if "matplotlib" in built.packages else ""))
    for path, data in kept.items():
        _make_readable_directory(built.directory / "fonts")
        _write(built.directory / "fonts" / Path(path).name, data)


def _use(home: Path, digest: str) -> None:
    """Point `current` to it. The one before stays, for what runs in it now; those before that go."""
    current = home / "current"
    before = current.readlink().name if current.is_symlink() else ""
    new = home / ".building-link"
    new.unlink(missing_ok=True)
    new.symlink_to(digest)
    new.replace(current)
    for old in home.iterdir():
        if old.name not in {digest, before, "current"} and old.is_dir():
            shutil.rmtree(old, ignore_errors=True)


def _current(home: Path) -> Built | None:
    try:
        digest = (home / "current").readlink().name
        label = _Label.model_validate_json((home / digest / "runtime.json").read_bytes())
    except (OSError, ValidationError):
        return None
    return Built(home.name, home / digest, digest, label.packages, label.imports)


def _installed(names: Iterable[str]) -> list[Distribution]:
    """These packages and all that they need, as they are installed beside ferrum; nothing where one is missing."""
    found: dict[str, Distribution] = {}
    wanted = list(names)
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in found:
            continue
        try:
            one = distribution(name)
        except PackageNotFoundError:
            return []
        found[name] = one
        needs = map(Requirement, one.requires or ())
        wanted += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return [found[name] for name in sorted(found)]


def _digest(parts: Iterable[Distribution], imports: Iterable[str]) -> str:
    """Over the content of the packages: a wheel's RECORD has a hash of each of its files."""
    hashed = sha256(json.dumps([_FORMAT, *imports]).encode())
    for part in parts:
        lines = (part.read_text("RECORD") or "").splitlines()
        # How it was installed, and by whom, is not what it is.
        kept = sorted(line for line in lines if ".dist-info/" not in line and "__pycache__" not in line)
        hashed.update(json.dumps([part.metadata["Name"], part.version, kept]).encode())
    return hashed.hexdigest()[:16]


def _link(part: Distribution, site: Path) -> None:
    """Put a package's files there, without scripts and without its own tests, which are half of pandas."""
    made: set[Path] = set()
    for file in part.files or ():
        if file.parts[0] == ".." or "tests" in file.parts or "__pycache__" in file.parts:
            continue
        source, target = Path(str(part.locate_file(file))), site / file
        if target.parent not in made:
            target.parent.mkdir(parents=True, exist_ok=True)
            made.add(target.parent)
        _link_or_copy(source, target)


def _link_or_copy(source: Path, target: Path) -> None:
    # Its mode is its own, so only a file that needs no other may be one with the installed one.
    if source.stat().st_mode & stat.S_IROTH:
        try:
            os.link(source, target)
        except OSError:
            # Another file system, or someone else's file: then a copy.
            pass
        else:
            return
    shutil.copyfile(source, target)


def _install(requirements: Path, site: Path) -> None:
    options = ["--only-binary", ":all:", "--target", str(site.absolute())]
    done = subprocess.run(  # noqa: S603
        [*_installer(), *options, "--requirement", str(requirements.absolute())],
        # Where we stand there may be a stranger's uv.toml, which names an index.
        cwd=requirements.absolute().parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_installers_environment(os.environ),
        check=False,
    )
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()
        raise Unavailable(f"{requirements} could not be installed: {_shown(said)}")


def _installer() -> list[str]:
    if uv := shutil.which("uv"):
        # Copied, since a link would share its mode with uv's cache.
        return [uv, "pip", "install", "--quiet", "--link-mode", "copy", "--python", sys.executable]
    options = ["install", "--quiet", "--no-compile", "--no-input", "--disable-pip-version-check"]
    if find_spec("pip"):
        return [sys.executable, "-P", "-m", "pip", *options]
    if base := _outer_pip():
        # The one outside of our virtual environment: of the same Python, so its wheels fit.
        return [base, "-P", "-m", "pip", *options]
    raise Unavailable("a runtime is built by uv or pip, and this machine has neither: put uv on PATH")


def _outer_pip() -> str | None:
    base: str = getattr(sys, "_base_executable", sys.executable)
    tried = subprocess.run([base, "-I", "-m", "pip", "--version"], capture_output=True, check=False)  # noqa: S603
    return base if tried.returncode == 0 else None


def _installers_environment(environ: Mapping[str, str]) -> dict[str, str]:
    # The certificates of this machine: behind a company's proxy those that uv brings know no issuer.
    return {"UV_SYSTEM_CERTS": "1", "UV_NATIVE_TLS": "1"} | {
        name: value
        for name, value in environ.items()
        if name.startswith(_FOR_INSTALLERS) or name.upper() in _ALSO_FOR_INSTALLERS
    }


def _shown(said: str) -> str:
    """The end of what an installer said, which may have shown the address of an index with its password."""
    return _CREDENTIALS.sub("://***@", redact("\n".join(said.splitlines()[-12:])))


def _compile(site: Path) -> None:
    # Never checked against the source, which saves a look at each file; what does not compile is not for this Python.
    options = ["-q", "-j", "0", "--invalidation-mode", "unchecked-hash", "-x", r"/tests/"]
    subprocess.run(  # noqa: S603
        [sys.executable, "-I", "-m", "compileall", *options, str(site)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={},
        check=False,
    )


def _tidy(directory: Path) -> None:
    """Make all of it readable for everyone, whatever the umask, and leave out what is of the host."""
    shutil.rmtree(directory / "site" / "bin", ignore_errors=True)
    directory.chmod(0o755)
    for at, directories, files in os.walk(directory):
        for name in directories:
            Path(at, name).chmod(0o755)
        for name in files:
            file = Path(at, name)
            # `direct_url.json` has the address that a package came from.
            if file.is_symlink() or name in {"direct_url.json", ".lock"}:
                file.unlink()
            elif not (mode := file.stat().st_mode) & stat.S_IROTH:
                file.chmod(stat.S_IMODE(mode) | 0o444)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o644)


def _make_readable_directory(path: Path) -> None:
    """Make a directory and those above it that are missing, open to everyone whatever the umask."""
    if path.is_dir():
        return
    _make_readable_directory(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        # Another build was quicker.
        return
    path.chmod(0o755)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One at a time, over all processes; a process that dies lets go."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
