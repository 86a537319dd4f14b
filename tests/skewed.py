"""A worker whose clock is `$SKEW` seconds off: `python -m skewed OPTIONS`, else as `ferrum.start_worker`."""

from __future__ import annotations

import os
import runpy
import time

_SKEW_S = float(os.environ["SKEW"])
_time, _time_ns = time.time, time.time_ns

# Before anything that takes them by their names is imported.
time.time = lambda: _time() + _SKEW_S
time.time_ns = lambda: _time_ns() + round(_SKEW_S * 1e9)

if __name__ == "__main__":
    runpy.run_module("ferrum.start_worker", run_name="__main__", alter_sys=True)
