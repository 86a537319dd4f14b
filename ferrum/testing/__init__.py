"""What tests of workflows need; each part is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferrum.testing.inline import InlineRun, Scripted, Sent, Shared, run_inline

_INLINE = ("InlineRun", "Scripted", "Sent", "Shared", "run_inline")
__all__ = ["InlineRun", "Scripted", "Sent", "Shared", "run_inline"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _INLINE:
        return getattr(import_module("ferrum.testing.inline"), name)
    raise AttributeError(f"module 'ferrum.testing' has no attribute {name!r}")
