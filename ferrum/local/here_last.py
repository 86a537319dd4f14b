"""Run a module as `python -m` does, but with the working directory last on the path and not first.

    python -P here_last.py MODULE [ARGUMENT …]

A program of its own: what it runs need not find ferrum.
"""

import os
import sys
from runpy import run_module

if __name__ == "__main__":
    sys.path.append(os.getcwd())  # noqa: PTH109
    del sys.argv[0]
    run_module(sys.argv[0], run_name="__main__", alter_sys=True)
