"""The users of the host that sandboxes of a root worker run as, each one of its own."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ferrum.sandbox.backend import Missing
from ferrum.sandbox.reach import libc

#: The first of them: the kernel counts processes by user.
FIRST_USER = 60001
_USERS = 512

_PR_CAP_AMBIENT, _CLEAR_ALL = 47, 4
#: The numbers of setgroups, setresgid and setresuid.
_CALLS = {"x86_64": (116, 119, 117), "aarch64": (159, 149, 147)}


class User:
    """A user of the host that no other sandbox of this machine has at the same time."""

    def __init__(self, uid: int, lock: socket.socket) -> None:
        self.uid = uid
        self._lock = lock

    @classmethod
    def take(cls) -> User | None:
        """`None` where we are not root: then sandboxes are of our own user. Raises `Missing` where none is left."""
        if os.geteuid() != 0:
            return None
        for uid in range(FIRST_USER, FIRST_USER + _USERS):
            lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                # A name that the kernel lets go of when its holder dies, and no file.
                lock.bind(f"\0ferrum-sandbox-{uid}")
            except OSError:
                lock.close()
                continue
            return cls(uid, lock)
        raise Missing(f"{_USERS} sandboxes run on this machine at the same time already: wait, or use more machines")

    def release(self) -> None:
        self._lock.close()


@contextmanager
def borrowed(user: User | None) -> Iterator[None]:
    """This thread is `user`, if there is one, and what it starts meanwhile can never be anybody else again.

    Not by `Popen(user=…)`, which copies the tables of all of the worker's memory (20 ms for 300 MB), nor by another
    program (1 ms). The C library would make all threads somebody else, so the kernel is asked, which knows of one.
    """
    with ExitStack() as back:
        if user is not None:
            _become(user.uid, back)
        yield


def _become(uid: int, back: ExitStack) -> None:
    setgroups, setresgid, setresuid = _CALLS[os.uname().machine]
    groups, gids, uids = os.getgroups(), os.getresgid(), os.getresuid()
    try:
        # For good: what is started would keep these, since root may still go back.
        libc("prctl", _PR_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0)
        libc("syscall", setgroups, 0, None)
        back.callback(libc, "syscall", setgroups, len(groups), (ctypes.c_uint32 * len(groups))(*groups))
        # The third is what a thread may go back to. A program that is started has the second there.
        libc("syscall", setresgid, uid, uid, 0)
        back.callback(libc, "syscall", setresgid, *gids)
        libc("syscall", setresuid, uid, uid, 0)
        back.callback(libc, "syscall", setresuid, *uids)
    except OSError as error:
        raise Missing(
            f"root cannot become user {uid} here, as which sandboxes run ({error.strerror}): give the container "
            "CAP_SETUID, CAP_SETGID and that many users, or run the worker as an ordinary user"
        ) from error
