"""ferrum runs AI agents in production, as durable workflows on Celery.

`submit` starts a run and `wait` gives its outputs; `watch` shows it live; `decide`, `signal`, `cancel`, `resume`,
`rerun` and `fork` are what people do to it; `register` keeps a workflow for others to use. Importing this is cheap:
what is heavy is imported where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_DOORS = (
    *("approvals", "cancel", "decide", "fork", "register", "rerun", "resume", "signal", "submit", "wait", "watch"),
)
__all__ = ["Workflow", "approvals", "cancel", "decide", "fork", "register"]
__all__ += ["rerun", "resume", "signal", "submit", "wait", "watch"]

if TYPE_CHECKING:
    from ferrum.runs import approvals, cancel, decide, fork, register, rerun, resume, signal, submit, wait, watch
    from ferrum.workflow import Workflow


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _DOORS:
        return getattr(import_module("ferrum.runs"), name)
    if name == "Workflow":
        return import_module("ferrum.workflow").Workflow
    raise AttributeError(f"module 'ferrum' has no attribute {name!r}")
