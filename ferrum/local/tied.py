"""Run a command that the kernel kills when the thread that started it dies (Linux).

    python -I -S tied.py PARENT_PID COMMAND [ARGUMENT …]

A program of its own, because between `fork` and `exec` in a process with threads no Python may run safely. It
replaces itself by the command, which so keeps the process id, the streams and the open descriptors.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    # The parent may have died before it was watched; then nobody would ever end the command.
    if os.getppid() == parent:
        os.execv(command[0], command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
