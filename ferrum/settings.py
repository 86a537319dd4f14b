"""Every setting of ferrum, as one frozen value; the only reader of the environment."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Final, Literal
from urllib.parse import parse_qs, parse_qsl, quote, quote_plus, unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from ferrum.errors import SettingsError, did_you_mean
from ferrum.sentinels import watched

#: Read by other parts of ferrum's own tool chain, not settings of a process.
_MARKS = frozenset({"FERRUM_REQUIRE_SANDBOX", "FERRUM_TEST_SIZE"})

#: Kubernetes tells every pod of the Services beside it: of one named `ferrum-redis` in `FERRUM_REDIS_SERVICE_HOST`,
#: `FERRUM_REDIS_PORT=tcp://10.0.0.1:6379` and five more (`enableServiceLinks`).
_SERVICE_LINK: Final = re.compile(
    r"FERRUM_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
_SERVICE_ADDRESS: Final = re.compile(r"(?:tcp|udp|sctp)://\S+:\d+")

log = logging.getLogger(__name__)

#: An environment variable whose name has one of these in it, or such an end, holds a secret. `PWD` is a directory.
_SECRET_NAME: Final = re.compile(
    r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|AUTHORIZATION|COOKIE|CONNECTION_STRING"
    r"|(?:_|-)(?:PASS|PWD|AUTH)$|^(?:PASS|AUTH)$"
)


class Missed(StrEnum):
    """What is done about a schedule's times that passed while no beat ran."""

    #: Nothing.
    SKIP = "skip"
    #: One run makes up for all of them.
    ONCE = "once"
    #: A run for each.
    ALL = "all"


class Settings(BaseModel):
    """The field `redis_url` is read from `FERRUM_REDIS_URL`, and so on. Times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    redis_url: SecretStr | None = Field(
        None, description="Redis of the fleet; `REDIS_URL` is read too. Without it: the private one of `ferrum redis`."
    )
    home: Path = Field(
        Path("~/.local/state/ferrum"), description="Where a private Redis, local artifacts and indexes keep their data."
    )
    artifacts: str | None = Field(
        None,
        description="Artifact store: `file:///path`, `s3://bucket/prefix`, `gs://…`, `az://…`. Default: under `home`.",
    )
    indexes: SecretStr | None = Field(
        None,
        description="Where indexes are kept: a directory `file:///path`, `postgresql://user:password@host/database` "
        "with pgvector, or a Qdrant, `qdrant+https://:key@host:6333`. Default: `indexes` under `home`.",
    )
    embedding: str | None = Field(
        None, description="Embedder of new indexes that name none: `lexical`, `local`, or a provider's model."
    )
    policy: Path | None = Field(
        None, description="Policy file; default: `ferrum.policy.yaml` here, once it is trusted, else all is denied."
    )
    servers: Path | None = Field(
        None, description="MCP servers file; default: `ferrum.servers.yaml` here, once it is trusted, if any."
    )
    mcp_servers: str | None = Field(None, description='MCP servers as JSON, `{"mcpServers": {…}}`; wins over the file.')
    model: str | None = Field(
        None, description="Model of `llm` steps that name none; else from the provider's key that is set."
    )
    prices: Path | None = Field(None, description="Price file: model to US dollars per million tokens, and aliases.")
    tenant: str = Field(
        "default", min_length=1, max_length=100, description="Whose runs this process starts, unless it is said."
    )
    warm: bool = Field(
        True,
        description="Whether a worker gets ready at its start for what the policy allows: no first call of a model "
        "waits for it then, and each worker computes for seconds.",
    )
    sandbox: Literal["auto", "bubblewrap", "gvisor", "container"] = Field(
        "auto",
        description="What isolates code: `bubblewrap`, `gvisor` or `container`; `auto` is the first that holds here.",
    )
    sandbox_warm: int = Field(
        2, ge=0, description="The most sandboxes that wait for code at any one time; there are as many as are used."
    )
    sandbox_idle: float = Field(60.0, gt=0, description="How long a sandbox waits that is not used.")
    runtimes: Path | None = Field(
        None,
        description="Where the runtimes of the sandbox are, such as those of an image; default: under `home`.",
    )
    imports: str = Field("", description="Modules with your own Celery tasks and functions, comma separated.")
    lease: float = Field(8.0, ge=1, description="A step whose worker was silent this long is given to another.")
    heartbeat: float = Field(0.5, gt=0, description="How often a worker renews its leases and hears of cancelled runs.")
    finish_unleased: str = Field(
        "",
        description="Step types, comma separated, `*` for all, that finish though their worker cannot reach Redis to "
        "renew their leases, perhaps beside their next attempt. All others are stopped before their lease ends.",
    )
    sweep: float = Field(0.5, gt=0, description="How often timers, dead workers and lost messages are looked for.")
    resend_after: float = Field(
        5.0,
        gt=0,
        description="A step that was ready this long and that no message can be on its way for is sent again.",
    )
    grace: float = Field(
        10.0, ge=0, description="How long a stopping worker lets running steps finish before it hands them back."
    )
    keep_runs: float = Field(7 * 86400.0, gt=0, description="How long an ended run stays in Redis.")
    missed: Missed = Field(
        Missed.ONCE,
        description="What is done about times of a schedule that passed while no beat ran, where `ferrum schedule add` "
        "does not say: `skip`, `once` or `all`.",
    )
    breaker_failures: int = Field(
        5, ge=1, description="So many failures within the window, in all workers, and a router leaves a target alone."
    )
    breaker_window: float = Field(60.0, gt=0, description="The window in which failures of a target are counted.")
    breaker_open: float = Field(30.0, gt=0, description="How long a target is left alone before one step tries it.")
    exit_when_idle: float | None = Field(
        None, gt=0, description="A worker stops itself after so long without a live run."
    )
    strict: bool = Field(
        False, description="Whether an unknown variable `FERRUM_…` is an error that stops the process; else a warning."
    )


def read(environ: Mapping[str, str]) -> Settings:
    """Settings from an environment.

    Raises `SettingsError` for a value that does not fit and, where `FERRUM_STRICT` is set, for a `FERRUM_` variable
    that nothing reads.
    """
    values: dict[str, str] = {}
    if url := environ.get("REDIS_URL"):
        values["redis_url"] = url
    for variable, field in _names().items():
        if text := environ.get(variable):
            values[field] = text
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise SettingsError(f"FERRUM_{str(first['loc'][0]).upper()}: {first['msg']}") from error
    if settings.strict and (wrong := unknown(environ)):
        raise SettingsError(wrong[0])
    if settings.heartbeat * 3 > settings.lease:
        raise SettingsError("FERRUM_LEASE must be at least three times FERRUM_HEARTBEAT, or one late beat loses a step")
    if settings.redis_url is not None and (problem := _wrong_with_redis(settings.redis_url.get_secret_value())):
        raise SettingsError(f"FERRUM_REDIS_URL (or REDIS_URL){problem}")
    return settings.model_copy(update={field: _expanded(settings, field) for field in ("home", "policy", "servers")})


def _expanded(settings: Settings, field: str) -> Path | None:
    """A path of the settings, where `~` is somebody's home. Raises `SettingsError` where that is nobody's."""
    path: Path | None = getattr(settings, field)
    try:
        return path and path.expanduser()
    except RuntimeError as error:
        raise SettingsError(f"FERRUM_{field.upper()}: {str(path)!r} begins with the home of nobody here") from error


def unknown(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each `FERRUM_` variable that nothing reads; none for what Kubernetes says of its Services."""
    names = _names()
    return [
        f"{variable} is not a setting of ferrum{did_you_mean(variable, names)}"
        for variable, text in environ.items()
        if variable.startswith("FERRUM_")
        and variable not in names
        and variable not in _MARKS
        and not _is_service_link(variable, text)
    ]


@cache
def _names() -> dict[str, str]:
    return {f"FERRUM_{field.upper()}": field for field in Settings.model_fields}


def _is_service_link(variable: str, text: str) -> bool:
    if variable.endswith("_PORT") and _SERVICE_ADDRESS.fullmatch(text):
        return True
    return _SERVICE_LINK.fullmatch(variable) is not None


def _wrong_with_redis(url: str) -> str | None:
    """The problem with a URL of Redis, without what may be a password; `None` where redis-py and Celery take it."""
    try:
        if watched(url):
            return None
        parts = urlsplit(url)
        # Reading the port checks it. A password with a `?` in it may pass for one, and its rest for options.
        is_one = parts.scheme in ("redis", "rediss", "unix") and parts.port != 0 and "@" not in parts.query
    except ValueError:
        is_one = False
    if not is_one:
        return (
            " is no URL of a Redis: they look like redis://:password@host:6379/0, rediss://…, unix:///path/to/socket "
            "or sentinel://:password@host:26379,host:26379/master"
        )
    if parts.scheme != "unix" and not re.fullmatch(r"(?:/\d*)?", parts.path):
        return f": the path is the number of a database, as /0, and not {parts.path[:_SHOWN]!r}"
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if wrong := _wrong_option(parts.scheme, name, value):
            return f": {wrong}"
    return None


_DATABASE: Final = re.compile(r"\d+")
#: Options of every URL of Redis, and those of `rediss://`; and the values that an option takes.
_OPTIONS: Final = frozenset({"db", "username", "password"})
_TLS_FILES: Final = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
_TLS_CHOICES: Final = {
    "ssl_cert_reqs": "'required', 'optional' or 'none'",
    "ssl_check_hostname": "'true' or 'false'",
}
_TLS: Final = _TLS_FILES | _TLS_CHOICES.keys()
#: What ferrum gives each connection, so that a dead one costs no lease.
_OURS: Final = re.compile(r"socket_\w+|timeout|health_check_interval|retry_on_\w+")
#: Characters of a value that are shown.
_SHOWN: Final = 80


def _wrong_option(scheme: str, name: str, value: str) -> str | None:
    known = _OPTIONS | _TLS if scheme == "rediss" else _OPTIONS
    shown, wrong = value[:_SHOWN], None
    if name in _TLS - known:
        wrong = f"{name!r} is for rediss://, which speaks TLS"
    elif _OURS.fullmatch(name):
        wrong = f"{name!r} is not for a URL: ferrum sets it itself, by FERRUM_LEASE"
    elif name not in known:
        wrong = f"there is no option {name[:_SHOWN]!r}{did_you_mean(name, known)}"
    elif name == "db" and not _DATABASE.fullmatch(value):
        wrong = f"'db' is the number of a database, as 0, and not {shown!r}"
    elif name in _TLS_CHOICES and (not value or repr(value) not in _TLS_CHOICES[name]):
        wrong = f"{name!r} is {_TLS_CHOICES[name]}, and not {shown!r}"
    elif name in _TLS_FILES and not Path(value).exists():
        wrong = f"{name!r}: there is no {shown!r}"
    return wrong


@cache
def settings() -> Settings:
    """The settings of this process, read once; unknown variables are logged as warnings."""
    found = read(os.environ)
    for sentence in unknown(os.environ):
        log.warning("%s", sentence)
    return found


def redact(text: str) -> str:
    """`text` with every secret of this process replaced by `***`.

    A secret is the value, of eight characters or more, of a variable whose name says so; the password of a URL, in
    `text` or in a variable, as it is written and decoded; what an assignment, a connection string, a header or a field
    of JSON gives to a name that says so; what follows `Bearer` or `Basic`; a key of a form that only keys have; and
    what `hide` was told.
    """
    text = _TOKEN_IN_URL.sub("://***@", _PASSWORD_IN_URL.sub(r"\1***@", _SECRET_IN_QUERY.sub(r"\1***", text)))
    text = _HEADER.sub(r"\1***", _AUTHORIZATION.sub(r"\1***", text))
    text = _KEY.sub("***", _FIELD.sub(r"\1***\2", _ASSIGNED.sub(r"\1***", text)))
    for secret in _secrets():
        text = text.replace(secret, "***")
    return text


def hide(secrets: Iterable[str]) -> None:
    """Let `redact` know secrets that do not come from the environment, such as values in a servers file."""
    _hidden.update(secrets)
    _secrets.cache_clear()


def says_secret(name: str) -> bool:
    """Tell whether the name of a variable or of an option says that its value is a secret."""
    return _SECRET_NAME.search(name.upper()) is not None


def passwords_in(text: str) -> set[str]:
    """The passwords of all URLs in a text, as they are written, decoded, and encoded as URLs have them."""
    found = {match[2] for match in _PASSWORD_IN_URL.finditer(text)}
    return {form for password in found for form in _forms(password)}


#: Up to the last `@` of what may stand before a host; `:` and what follows it is the password.
_PASSWORD_IN_URL: Final = re.compile(r"""(://[^\s/?#@:"'<>`]*:)([^\s/?#"'<>`]+)@""")
#: Without a password it may be a token, and is one where no name of a user would be so long.
_TOKEN_IN_URL: Final = re.compile(r"""://[^\s/?#@:"'<>`]{20,}@""")
_SECRET_IN_QUERY: Final = re.compile(
    r"""([?&](?:[\w.-]{0,40}(?:password|token|secret|api_?key|signature|credential)|key|sig|auth|pwd|passwd)=)"""
    r"""[^\s&#"'<>`]+""",
    re.IGNORECASE,
)
#: What a request shows itself by, as HTTP libraries print it.
_AUTHORIZATION: Final = re.compile(r"\b((?:Bearer|Basic)\s{1,4})[\w.~+/=-]{16,}", re.IGNORECASE)
_HEADER: Final = re.compile(
    r"""\b((?:authorization|(?:x-)?(?:api-key|auth-token|access-token))["']?\s{0,3}[:=]\s{0,3}["']?"""
    r"""(?:(?:bearer|basic|token|digest|apikey)\s{1,4})?)(?!(?:bearer|basic|token|digest|apikey)\s)"""
    # A word of prose is none.
    r"""(?=[^\s,;"'<>]{0,60}\d|[^\s,;"'<>]{12})[^\s,;"'<>*]{4,}""",
    re.IGNORECASE,
)
#: Names of what is secret and nothing else: `token` alone counts words as often.
_NAMES: Final = (
    r"(?:password|passwd|passphrase|(?:api|access|account|private|shared_?access|secret)[_-]?key|client[_-]?secret|"
    r"(?:auth|access|refresh|session|bearer)[_-]?token)"
)
#: `password=…`, as in the words that libpq or an Azure account are connected by.
_ASSIGNED: Final = re.compile(
    rf"""({_NAMES}\s{{0,3}}=\s{{0,3}})(?:'[^'\n]*'|"[^"\n]*"|[^\s,;&"'<>=*)]{{3,}}=*)""", re.IGNORECASE
)
#: `"password": "…"`, as JSON and Python print it.
_FIELD: Final = re.compile(rf"""({_NAMES}["']\s{{0,3}}:\s{{0,3}}(["']))(?:\\.|(?!\2)[^\\\n])*\2""", re.IGNORECASE)
#: Keys as providers make them, which nothing else looks like.
_KEY: Final = re.compile(
    r"\b(?:sk-(?=[\w-]{0,60}\d)|gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|hf_|AIza|AKIA)[\w-]{16,200}"
)
#: The address of a proxy, which needs no scheme.
_PROXY: Final = re.compile(r"[^\s/?#@:]*:([^\s]+)@[^\s@]+")

#: What `hide` was told.
_hidden: Final[set[str]] = set()


@cache
def _secrets() -> tuple[str, ...]:
    found = set(_hidden)
    for name, value in os.environ.items():
        if len(value) >= 8 and says_secret(name):
            found.add(value)
        found |= {secret for secret in _inside(name, value) if len(secret) >= 8}
    for name in ("FERRUM_REDIS_URL", "REDIS_URL", "FERRUM_INDEXES"):
        found |= {password for password in _password_of(os.environ.get(name, "")) if len(password) >= 4}
    return tuple(sorted(found, key=len, reverse=True))


def _inside(name: str, value: str) -> Iterator[str]:
    """The secrets that the value of a variable holds among other things."""
    yield from passwords_in(value)
    yield from (match[0][3:-1] for match in _TOKEN_IN_URL.finditer(value))
    for match in _ASSIGNED.finditer(value):
        yield match[0].removeprefix(match[1]).strip("'\"")
    if name.upper().endswith("_PROXY") and (proxy := _PROXY.fullmatch(value)):
        yield from _forms(proxy[1])
    if name.upper().endswith("_HEADERS"):
        # As OpenTelemetry has them: `name=value,name=value`.
        for one in value.split(","):
            text = unquote(one.partition("=")[2]).strip()
            yield from (text, text.rpartition(" ")[2])


def _password_of(url: str) -> set[str]:
    """The password of one URL, which may hold what it should not: `/`, `@`; and one that is an option."""
    credentials = url.partition("://")[2].rpartition("@")[0]
    options = parse_qs(url.partition("?")[2]).get("password", [])
    return {form for password in (credentials.partition(":")[2], *options) for form in _forms(password)}


def _forms(password: str) -> set[str]:
    plain = unquote(password)
    return {password, plain, quote(plain, safe=""), quote_plus(plain)} - {""}
