"""Patterns that no act can ever match, and the nearest that some can: a rule that does nothing is a mistake."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Final

from ferrum.governance.names import provider_of, providers

#: What servers of tools are called.
_SERVER: Final = re.compile(r"[a-z0-9_-]+")
#: What indexes and runtimes are called, with stars in it.
_NAME: Final = re.compile(r"[a-z0-9*][a-z0-9._*-]*")
_LONGEST_NAME: Final = 64
#: How like a known provider a name must be to be taken for a slip.
_LIKE: Final = 0.8


def nearest(kind: str, target: str) -> str | None:
    """Return what to write in place of `target`; `None` where an act of this kind may match it."""
    return _NEAREST[kind](target)


def _tool(target: str) -> str | None:
    server, mark, tool = _split(target, ".")
    if server and not _SERVER.fullmatch(server):
        server = re.sub("[^a-z0-9_-]", "-", server.lower())
        return f"{server}{mark}{tool}" if mark else f"{server}.*"
    if not mark:
        return f"{server}.*"
    if mark == ".":
        return None if server and tool else f"{server or '*'}.{tool or '*'}"
    return None


def _model(target: str) -> str | None:
    provider, mark, name = _split(target, "/")
    if not mark:
        found = provider_of(target)
        return f"{found}/{target}" if found else f"{_meant(target)}/*" if _meant(target) else f"*/{target}"
    if mark == "*":
        if any(one.startswith(provider) for one in providers()) or not providers():
            return None
        lower = provider.lower()
        return f"{lower}*{name}" if any(one.startswith(lower) for one in providers()) else f"*/{target}"
    meant = _meant(provider) or provider
    return None if meant == provider and provider and name else f"{meant or '*'}/{name or '*'}"


def _meant(said: str) -> str:
    """The provider that litellm knows by this name, or nearly; empty where there is none."""
    near = get_close_matches(said.lower(), sorted(providers()), n=1, cutoff=_LIKE)
    return said if said in providers() else "".join(near)


def _named(target: str) -> str | None:
    if _NAME.fullmatch(target) and len(target.replace("*", "")) <= _LONGEST_NAME:
        return None
    return re.sub("[^a-z0-9._*-]", "-", target.lower()).lstrip("-._")[:_LONGEST_NAME] or "*"


def _task(target: str) -> str | None:
    # Those of the platform are no steps.
    return "*" if target.startswith(("celery.", "ferrum.")) else None


def _split(target: str, separator: str) -> tuple[str, str, str]:
    """Split at the first separator or star: before, the mark, after; without either, the mark is empty."""
    found = re.search(rf"[*{re.escape(separator)}]", target)
    return (target[: found.start()], found[0], target[found.end() :]) if found else (target, "", "")


_NEAREST: Final[Mapping[str, Callable[[str], str | None]]] = {
    "tool": _tool,
    "model": _model,
    "sandbox": _named,
    "retrieval": _named,
    "ingest": _named,
    "task": _task,
}
