"""Code that nobody has read, run where it can do no harm: one sandbox for one run of it, ended with it.

`Sandboxes` is all that the rest of ferrum needs. `backend.py` says what a backend is, `init.py` what runs as PID 1
inside, `wire.py` how the two talk.
"""

from __future__ import annotations

from ferrum.sandbox.backend import Kind
from ferrum.sandbox.probe import Probe
from ferrum.sandbox.runs import Sandboxes
from ferrum.sandbox.runtimes import Runtime

__all__ = ["Kind", "Probe", "Runtime", "Sandboxes"]
