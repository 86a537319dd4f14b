"""Read by each Python that a test starts with this directory on its path: hands what is slow to start to a fork.

A process of ferrum's or Celery's spends its first seconds importing what others have imported a moment before. The
server of `server.py` has it all; it forks, and the fork does what this process was started for. This process stays as
its stand-in: it passes signals on, ends as the fork ends, and when it is killed, so is the fork.

Nothing is imported here that is not needed: this runs at every start. Where no server answers, the process goes on by
itself.
"""

import os
import sys

#: The socket of the server.
_SOCKET = "PRELOADED_SOCKET"
#: What else is handed over: `-c`, and modules by their names.
_ALSO = os.environ.get("PRELOADED_ALSO", "").split()
#: Variables of coverage.py, kept aside: the fork measures itself, and to measure its stand-in costs more than it does.
_COVERAGE = {f"PRELOADED_{name}": name for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")}


def _program(arguments):
    """Where the module or script that is started stands among the arguments; `None` for all that is not ours."""
    at = 1
    while at < len(arguments):
        word = arguments[at]
        if word == "-m":
            name = arguments[at + 1] if at + 1 < len(arguments) else ""
            return (at + 1) if name.partition(".")[0] in ("celery", "ferrum", *_ALSO) else None
        if word == "-c":
            return (at + 1) if word in _ALSO else None
        if word in ("-W", "-X"):
            at += 2
        elif word in ("-u", "-P", "-B", "-E") or word.startswith("-W"):
            at += 1
        elif word.startswith("-"):
            return None
        else:
            return at if os.path.basename(word) in ("ferrum", "celery", *_ALSO) else None
    return None


def _hand_over(path, at):
    import _socket
    import marshal

    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        server.connect(path)
    except OSError:
        return
    umask = os.umask(0)
    os.umask(umask)
    asked = marshal.dumps((list(sys.orig_argv), at, dict(os.environ), os.getcwd(), umask))
    descriptors = b"".join(number.to_bytes(4, sys.byteorder) for number in (0, 1, 2))
    server.sendmsg([len(asked).to_bytes(4, "big")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)])
    server.sendall(asked)
    begun = server.recv(4)
    if not begun:
        return
    _stand_in(server, int.from_bytes(begun, "big"))


def _stand_in(server, fork):
    import signal

    def pass_on(number, _):
        try:
            os.kill(fork, number)
        except ProcessLookupError:
            pass

    ended_by = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    for number in ended_by:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    # Only the fork reads and writes: whoever is at the other end must see it end.
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    status = server.recv(4)
    code = int.from_bytes(status, "big", signed=True) if status else -signal.SIGKILL
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if _SOCKET in os.environ:
    _at = _program(sys.orig_argv)
    if _at is not None:
        _hand_over(os.environ[_SOCKET], _at)
    # By itself, and so measured by itself.
    for _aside, _name in _COVERAGE.items():
        if _aside in os.environ:
            os.environ[_name] = os.environ[_aside]
    if any(_name in os.environ for _name in _COVERAGE.values()) and "coverage" not in sys.modules:
        import coverage

        coverage.process_startup(slug="pth")
