"""Python's search path for modules: never first, and mostly without, the directory that one stands in.

Imports nothing that is not in every interpreter from its start, for until `leave_here` anything may be a stranger's.
"""

import os
import sys


def leave_here() -> None:
    """Undo what `python -m` does for the module that calls this: it puts the working directory first on the path.

    A ferrum that runs from a checkout which is not installed is found there, so that directory goes to the end.
    """
    if sys.flags.safe_path:
        return
    here = sys.path.pop(0)
    if here == os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))):  # noqa: PTH100, PTH120
        sys.path.append(here)


def look_here_last() -> None:
    """Let modules of the working directory be found, behind all others."""
    here = os.getcwd()  # noqa: PTH109
    if here not in sys.path:
        sys.path.append(here)
