"""The artifact store, on real directories, in memory and on a server that speaks S3."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fleet import PATIENCE_S
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue, ValidationError

from ferrum.artifacts import INLINE_LIMIT, Artifacts, Kept, Ref
from ferrum.errors import NotFound, OutputError, SettingsError, Unavailable
from ferrum.settings import Settings

#: A busy machine is not a failure.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

ROOT = Path(__file__).parent.parent

json_values: st.SearchStrategy[JsonValue] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(["v", "ref"]), inner),
    max_leaves=10,
)


class S3(ThreadingHTTPServer):
    """As much of S3 as keeping objects takes: PUT and GET of one key, with signed requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), S3Request)
        self.objects: dict[str, bytes] = {}


class S3Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if "Credential=AKIATEST/" not in self.headers.get("Authorization", ""):
            return self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        self.server.objects[self.path] = data
        return self.answer(200, b"")

    def do_GET(self) -> None:
        if self.path not in self.server.objects:
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return self.answer(200, self.server.objects[self.path])

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    with S3() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-real-one")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    if request.param == "s3":
        request.getfixturevalue("s3")
    urls = {"file": (tmp_path / "artifacts").as_uri(), "memory": "memory://", "s3": "s3://bucket/team"}
    return Artifacts(urls[request.param])


@pytest.fixture
def local(tmp_path: Path) -> Artifacts:
    return Artifacts((tmp_path / "artifacts").as_uri())


def files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "artifacts").rglob("*") if path.is_file())


@pytest.mark.parametrize("data", [b"", b"hello", bytes(range(256)) * 1000])
def test_what_was_put_is_got(store: Artifacts, data: bytes) -> None:
    ref = store.put(data, "image/png")
    assert ref.size == len(data)
    assert ref.media_type == "image/png"
    assert store.get(ref) == data


def test_the_same_bytes_have_the_same_reference(store: Artifacts) -> None:
    assert store.put(b"twice", "text/plain") == store.put(b"twice", "text/plain")


def test_a_missing_artifact_is_not_found(store: Artifacts) -> None:
    ref = Artifacts("memory://").put(b"elsewhere", "text/plain")
    with pytest.raises(NotFound, match=f"{ref.digest} is not in"):
        store.get(ref)


def test_a_json_value_survives(store: Artifacts) -> None:
    value: JsonValue = {"text": "grün", "numbers": [1, 2.5, None, True]}
    assert store.get_json(store.put_json(value)) == value


def test_an_object_of_many_megabytes_is_kept_whole(local: Artifacts) -> None:
    data = os.urandom(1024) * 12_000
    assert local.get(local.put(data, "application/octet-stream")) == data


def test_equal_bytes_are_stored_once_under_their_hash(local: Artifacts, tmp_path: Path) -> None:
    ref = local.put(b"once", "text/plain")
    local.put(b"once", "text/plain")
    digest = hashlib.sha256(b"once").hexdigest()
    assert files(tmp_path) == [tmp_path / "artifacts" / "sha256" / digest[:2] / digest[2:]]
    assert ref.model_dump() == {"$artifact": f"sha256:{digest}", "size": 4, "media_type": "text/plain"}


def test_a_damaged_artifact_is_never_returned_and_putting_it_again_repairs_it(local: Artifacts, tmp_path: Path) -> None:
    ref = local.put(b"precious", "text/plain")
    files(tmp_path)[0].write_bytes(b"preciouS")
    with pytest.raises(Unavailable, match=f"{ref.digest} in .* is damaged"):
        local.get(ref)
    local.put(b"precious", "text/plain")
    assert local.get(ref) == b"precious"


def test_a_store_that_cannot_be_read_or_written_is_unavailable(local: Artifacts, tmp_path: Path) -> None:
    ref = local.put(b"x", "text/plain")
    path = files(tmp_path)[0]
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("not a directory")
    with pytest.raises(Unavailable, match="cannot read artifact") as reading:
        local.get(ref)
    with pytest.raises(Unavailable, match="cannot store 1 bytes in") as writing:
        local.put(b"x", "text/plain")
    assert "\n" not in str(reading.value) + str(writing.value)


def test_a_refused_upload_is_unavailable_and_shows_no_secret(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAOTHER")
    store = Artifacts("s3://bucket")
    with pytest.raises(Unavailable, match="cannot store 1 bytes in s3://bucket") as caught:
        store.put(b"x", "text/plain")
    assert "not-a-real-one" not in str(caught.value)
    assert "AKIAOTHER" not in str(caught.value)
    assert s3.objects == {}


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *args], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


FULL_DISK = """
import resource, sys
from ferrum.artifacts import Artifacts
from ferrum.errors import Unavailable
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = Artifacts(sys.argv[1])
store.put(b"small", "text/plain")
for size in (200_000, 8_000_000):
    try:
        store.put(b"x" * size, "text/plain")
    except Unavailable as error:
        print(error)
"""


def test_a_write_that_fails_halfway_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run(FULL_DISK, (tmp_path / "artifacts").as_uri())
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.partition(" in file:")[0] for line in lines] == [
        "cannot store 200000 bytes",
        "cannot store 8000000 bytes",
    ]
    assert [path.read_bytes() for path in files(tmp_path)] == [b"small"]


PUT_FOREVER = """
import os, sys
from ferrum.artifacts import Artifacts
store = Artifacts(sys.argv[1])
while True:
    print(store.put(os.urandom(1000) * 2000, "text/plain").model_dump_json(), flush=True)
"""


def test_a_killed_process_leaves_no_torn_object(local: Artifacts, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", PUT_FOREVER, local.url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(3)]
        child.send_signal(signal.SIGKILL)
    for line in told:
        local.get(Ref.model_validate_json(line))
    for path in files(tmp_path):
        if "#" not in path.name:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.parent.name + path.name


FORK = """
import os, sys
from ferrum.artifacts import Artifacts
from ferrum.errors import Unavailable
store = Artifacts(sys.argv[1])
ref = store.put(b"x", "text/plain")
child = os.fork()
if child == 0:
    try:
        store.get(ref)
    except Unavailable as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def test_a_store_used_before_a_fork_says_so_instead_of_hanging() -> None:
    assert "was used before this process was forked" in run(FORK, "memory://").stdout


def test_a_store_opened_but_not_used_before_a_fork_works(tmp_path: Path) -> None:
    script = FORK.replace('ref = store.put(b"x", "text/plain")', "").replace(
        "store.get(ref)", 'print(store.put(b"x", "text/plain").size, flush=True)'
    )
    assert run(script, (tmp_path / "artifacts").as_uri()).stdout == "1\n"


def test_a_local_store_is_its_owners_only(tmp_path: Path) -> None:
    Artifacts((tmp_path / "a b" / "artifacts").as_uri())
    assert (tmp_path / "a b" / "artifacts").stat().st_mode & 0o777 == 0o700


def test_without_a_url_artifacts_are_kept_under_home(tmp_path: Path) -> None:
    store = Artifacts.of(Settings(home=tmp_path / "home #1"))
    store.put(b"x", "text/plain")
    assert (tmp_path / "home #1" / "artifacts" / "sha256").is_dir()
    assert Artifacts.of(Settings(home=tmp_path, artifacts="memory://")).url == "memory://"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "is no artifact store: write file:///absolute/path, s3://"),
        ("/var/artifacts", "is no artifact store"),
        ("http://host/path", "is no artifact store"),
        ("s3:", "s3:"),
        ("az://container/x", "Account must be specified"),
        ("file://relative/path", "a local path is absolute"),
        ("file:relative", "a local path is absolute"),
        ("file:///dev/null/artifacts", "cannot create the directory '/dev/null/artifacts': Not a directory"),
        ("s3://[bucket", "is not a URL"),
        ("s3://bucket/x?region=y", "must not hold credentials, '[?]' or '#'"),
    ],
)
def test_a_url_that_is_no_store_is_refused(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(SettingsError, match=f"^FERRUM_ARTIFACTS.*{message}"):
        Artifacts(url)


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(SettingsError) as caught:
        Artifacts("s3://user:hunter22@bucket/x")
    assert "hunter22" not in str(caught.value)
    assert "credentials are read from the cloud's usual environment variables" in str(caught.value)


def test_a_small_value_stays_in_the_record_and_a_large_one_becomes_a_reference(store: Artifacts) -> None:
    small, large = "x" * (INLINE_LIMIT - 2), "x" * (INLINE_LIMIT - 1)
    assert store.keep(small) == Kept(inline=small)
    kept = store.keep(large)
    assert kept.inline is None
    assert kept.ref is not None
    assert kept.ref.size == INLINE_LIMIT + 1
    assert len(kept.dumps()) < 200
    assert store.resolve(Kept.loads(kept.dumps())) == large


def test_the_limit_counts_bytes_and_not_characters(store: Artifacts) -> None:
    assert store.keep("ü" * 20, limit=40).ref is not None
    assert store.keep("u" * 20, limit=40).ref is None


@unhurried
@given(value=json_values, limit=st.sampled_from([0, 20, INLINE_LIMIT]))
def test_what_is_kept_comes_back(value: JsonValue, limit: int) -> None:
    store = Artifacts("memory://")
    assert store.resolve(Kept.loads(store.keep(value, limit).dumps())) == value


def test_a_reference_forged_by_a_tool_stays_the_data_that_it_is(store: Artifacts) -> None:
    secret = store.put_json("another run's secret").model_dump()
    forgeries: list[JsonValue] = [
        secret,
        {"ref": secret},
        {"v": None, "ref": secret},
        [secret],
        {"inline": 1, "ref": secret},
    ]
    for forged in forgeries:
        kept = Kept.loads(store.keep(forged).dumps())
        assert kept.ref is None
        assert store.resolve(kept) == forged


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", object(), b"bytes"])
def test_what_is_not_json_cannot_be_kept(local: Artifacts, value: object, tmp_path: Path) -> None:
    for keep in (local.keep, local.put_json):
        with pytest.raises(OutputError, match="it is not JSON"):
            keep({"deep": [value]})  # type: ignore[list-item]
    assert files(tmp_path) == []


def test_a_value_nested_without_end_cannot_be_kept(local: Artifacts) -> None:
    endless: list[JsonValue] = []
    endless.append(endless)
    with pytest.raises(OutputError, match="it is not JSON"):
        local.keep(endless)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "not json",
        '{"v": 1, "ref": null}',
        '{"x": 1}',
        '{"ref": null}',
        '{"ref": {}}',
        '{"ref": {"$artifact": "sha256:../../etc/passwd", "size": 1, "media_type": "x"}}',
        b"\xff",
        '{"v": ' + "[" * 200_000 + "]" * 200_000 + "}",
    ],
    ids=range(12),
)
def test_a_damaged_record_is_unavailable(text: str | bytes) -> None:
    with pytest.raises(Unavailable, match="a stored output is damaged"):
        Kept.loads(text)


def test_an_artifact_that_is_not_json_cannot_be_read_as_json(store: Artifacts) -> None:
    with pytest.raises(Unavailable, match=r"\(image/png\) cannot be read as JSON"):
        store.get_json(store.put(b"\x89PNG", "image/png"))


HEX = "ab" * 32


@pytest.mark.parametrize(
    "value",
    [
        None,
        "sha256",
        {},
        {"$artifact": f"sha256:{HEX}"},
        {"$artifact": f"sha256:{HEX}\n", "size": 3, "media_type": "x"},
        {"$artifact": f"sha256:{HEX.upper()}", "size": 3, "media_type": "x"},
        {"$artifact": f"sha256:{HEX}", "size": "3", "media_type": "x"},
        {"$artifact": f"sha256:{HEX}", "size": -1, "media_type": "x"},
        {"$artifact": f"sha256:{HEX}", "size": 3, "media_type": "x", "more": 1},
        {"digest": f"sha256:{HEX}", "size": 3, "media_type": "x"},
    ],
)
def test_what_is_written_otherwise_is_no_reference(value: JsonValue) -> None:
    with pytest.raises(ValidationError):
        Ref.model_validate(value, by_name=False)


def test_a_reference_cannot_name_a_path() -> None:
    with pytest.raises(ValidationError):
        Ref(digest="sha256:../../../etc/passwd", size=1, media_type="text/plain")
