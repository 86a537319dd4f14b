"""Big things by reference: what a step left behind and Redis should not carry.

An artifact is stored under the sha256 of its content, so storing it twice is storing it once, and what is read is
checked against its name. Where a value came from a model or a tool, nothing in it is ever taken for a reference: see
`Kept`.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from contextlib import suppress
from datetime import timedelta
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, from_url
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from ferrum.errors import NotFound, OutputError, SettingsError, Unavailable
from ferrum.local.home import own
from ferrum.settings import Settings, redact, settings

if TYPE_CHECKING:
    from obstore.store import ObjectStore

#: A value whose JSON has more bytes than this is kept by reference.
INLINE_LIMIT: Final = 32 * 1024

JSON: Final = "application/json"

#: The file that says which store a directory is.
_MARKER: Final = ".ferrum-store"
_CLOUD: Final = frozenset({"s3", "gs", "az"})
_SUPPORTED: Final = (
    "write file:///absolute/path, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or memory://"
)


class Ref(BaseModel):
    """The name of an artifact: `{"$artifact": "sha256:…", "size": …, "media_type": …}` as JSON."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )

    digest: str = Field(alias="$artifact", pattern=r"^sha256:[0-9a-f]{64}$")
    #: In bytes.
    size: int = Field(ge=0)
    media_type: str

    @property
    def key(self) -> str:
        """Where a store keeps it: `sha256/ab/cdef…`."""
        hexadecimal = self.digest.removeprefix("sha256:")
        return f"sha256/{hexadecimal[:2]}/{hexadecimal[2:]}"


class Kept(BaseModel):
    """An output as the run record holds it: the value itself, or a reference that the platform wrote.

    What a step returned is data and may come from an attacker, so a reference is told from data by where it stands and
    not by what it looks like. Stored, a value is `{"v": value}` and a reference `{"ref": {…}}`: whatever a tool
    returns ends up under `v`, which is never looked into.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: The value; `None` too where there is a `ref`.
    inline: JsonValue = None
    ref: Ref | None = None

    def dumps(self) -> str:
        """The envelope as JSON. Raises `OutputError` for a value that is not JSON."""
        if self.ref is not None:
            return json.dumps({"ref": self.ref.model_dump()}, separators=(",", ":"))
        return _encode({"v": self.inline}).decode()

    @classmethod
    def loads(cls, text: str | bytes) -> Kept:
        """Read what `dumps` wrote. Raises `Unavailable` for anything else: the record is damaged."""
        try:
            match json.loads(text):
                case {"v": value, **rest} if not rest:
                    # Not validated again: it is JSON, just read.
                    return cls.model_construct(inline=value, ref=None)
                case {"ref": ref, **rest} if not rest:
                    return cls(ref=Ref.model_validate(ref, by_name=False))
        except (ValueError, RecursionError) as error:
            raise Unavailable(f"a stored output is damaged: {type(error).__name__}") from error
        raise Unavailable("a stored output is damaged: it holds neither a value nor a reference")


class Artifacts:
    """The artifact store of a fleet.

    Its calls block, so they belong in a worker's threads and not on the event loop. Objects appear whole or not at
    all, also when the disk fills up or the process is killed. Credentials of a cloud are read from its usual
    environment variables (`AWS_…`, `GOOGLE_…`, `AZURE_…`). `memory://` lives and dies with this value.

    A process that has used a store must not fork children that use one too: the library's threads stay behind. They
    get an `Unavailable` that says so.
    """

    def __init__(self, url: str) -> None:
        """Open the store, and create its directory, for its owner only, where it is a local one.

        Raises `SettingsError` for a URL that no store can be opened with.
        """
        parts = _split(url)
        self.url: Final = url
        self._directory: Final = _directory(parts) if parts.scheme == "file" else None
        self._store: Final = _open(url, parts.scheme, self._directory)

    @classmethod
    def of(cls, settings: Settings) -> Artifacts:
        """The store that the settings name; by default a directory under `home`."""
        return cls(settings.artifacts or (own(settings.home) / "artifacts").as_uri())

    @property
    def identity(self) -> str:
        """The same in all processes for which this is the same store, wherever they see it.

        A directory has a file in it that says so, for it may be mounted at another path, and another one at this.
        Raises `Unavailable` where the file cannot be made or read.
        """
        # Not through obstore: a pool may still fork this process.
        if self._directory is None:
            in_cloud = self.url.partition(":")[0] in _CLOUD
            return self.url if in_cloud else f"{self.url} {os.getpid()} {socket.gethostname()}"
        marker = self._directory / _MARKER
        try:
            if not marker.exists():
                made = self._directory / f"{_MARKER}-{uuid.uuid4().hex}"
                made.write_text(uuid.uuid4().hex)
                with suppress(FileExistsError):
                    # The first one counts, whole.
                    os.link(made, marker)
                made.unlink()
            return marker.read_text()
        except OSError as error:
            raise Unavailable(f"cannot use the artifact store {self.url}: {error.strerror}") from error

    def put(self, data: bytes, media_type: str) -> Ref:
        """Store some bytes and return their reference.

        What is there already is written over with the same bytes, which repairs it where it was damaged. Raises
        `Unavailable` where it cannot be stored, a full disk say, and then nothing is.
        """
        ref = Ref(digest=_digest(data), size=len(data), media_type=media_type)
        _refuse_after_fork()
        try:
            self._store.put(ref.key, data)
            if self._directory is not None:
                _sync(self._directory, self._directory / ref.key)
        except (BaseError, OSError) as error:
            raise Unavailable(f"cannot store {len(data)} bytes in {self.url}: {_first_line(error)}") from error
        return ref

    def get(self, ref: Ref) -> bytes:
        """The bytes behind a reference, checked against its hash.

        Raises `NotFound` where they are gone, `Unavailable` where they are damaged or the store cannot be read.
        """
        _refuse_after_fork()
        try:
            data = bytes(self._store.get(ref.key).bytes())
        except FileNotFoundError as error:
            raise NotFound(
                f"artifact {ref.digest} is not in {self.url}: it was deleted, or put in another store"
            ) from error
        except (BaseError, OSError) as error:
            raise Unavailable(f"cannot read artifact {ref.digest} from {self.url}: {_first_line(error)}") from error
        if _digest(data) != ref.digest:
            raise Unavailable(
                f"artifact {ref.digest} in {self.url} is damaged: its {len(data)} bytes hash to {_digest(data)}, "
                "so restore it from a backup or rerun the step that made it"
            )
        return data

    def put_json(self, value: JsonValue) -> Ref:
        """Store a value as JSON. Raises `OutputError` for what is not JSON, NaN included."""
        return self.put(_encode(value), JSON)

    def get_json(self, ref: Ref) -> JsonValue:
        """The value behind a reference that `put_json` returned."""
        data = self.get(ref)
        try:
            value: JsonValue = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Unavailable(f"artifact {ref.digest} ({ref.media_type}) cannot be read as JSON") from error
        return value

    def keep(self, value: JsonValue, limit: int = INLINE_LIMIT) -> Kept:
        """A value as the record should hold it: stored here and by reference where its JSON is over `limit` bytes.

        Raises `OutputError` for what is not JSON.
        """
        data = _encode(value)
        if len(data) > limit:
            return Kept(ref=self.put(data, JSON))
        return Kept.model_construct(inline=value, ref=None)

    def resolve(self, kept: Kept) -> JsonValue:
        """The value that was kept. Only the reference of the envelope is followed, never anything inside a value."""
        return kept.inline if kept.ref is None else self.get_json(kept.ref)


@cache
def process_artifacts() -> Artifacts:
    """The store of this process's settings."""
    return Artifacts.of(settings())


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise SettingsError(f"FERRUM_ARTIFACTS is not a URL: {_SUPPORTED}") from error
    # Shown nowhere until it is known to hold no password.
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise SettingsError(
            "FERRUM_ARTIFACTS must not hold credentials, '?' or '#': credentials are read from the cloud's usual "
            f"environment variables; {_SUPPORTED}"
        )
    if parts.scheme not in _CLOUD | {"file", "memory"}:
        raise SettingsError(f"FERRUM_ARTIFACTS is {url!r}, which is no artifact store: {_SUPPORTED}")
    return parts


def _directory(parts: SplitResult) -> Path:
    path = Path(unquote(parts.path))
    if parts.netloc or not path.is_absolute():
        raise SettingsError(
            f"FERRUM_ARTIFACTS is {parts.geturl()!r}: a local path is absolute, file:///var/lib/ferrum/artifacts"
        )
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"FERRUM_ARTIFACTS: cannot create the directory {str(path)!r}: {error.strerror}") from error
    return path


def _open(url: str, scheme: str, directory: Path | None) -> ObjectStore:
    if directory is not None:
        return LocalStore(directory)
    if scheme == "memory":
        return MemoryStore()
    try:
        # obstore would try for three minutes; a step should hear of it sooner, and has a retry of its own.
        return from_url(url, retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=30)})
    except (BaseError, ValueError) as error:
        # Not chained: obstore's error shows all that it parsed.
        raise SettingsError(f"FERRUM_ARTIFACTS is {url!r}: {_first_line(error)}") from None


def _sync(directory: Path, path: Path) -> None:
    """Make a local object outlive a power cut before anyone is told its name; obstore leaves that to the kernel."""
    for made in (path, path.parent, path.parent.parent, directory):
        descriptor = os.open(made, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@cache
def _process() -> int:
    """The process in which obstore's threads were started."""
    return os.getpid()


def _refuse_after_fork() -> None:
    if _process() != os.getpid():
        raise Unavailable(
            "the artifact store was used before this process was forked, and would hang here: "
            "use it only after the fork, or run the worker with --pool threads"
        )


def _digest(data: bytes) -> str:
    return f"sha256:{sha256(data).hexdigest()}"


def _encode(value: object) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise OutputError(f"the output cannot be kept, because it is not JSON: {error}") from error


def _first_line(error: Exception) -> str:
    """The sentence of an obstore error; the lines below it are a dump of its inside."""
    return redact(str(error).partition("\n")[0])
