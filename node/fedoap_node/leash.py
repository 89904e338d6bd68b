"""Runs a command that is ended with its parent: `python leash.py PARENT_PID COMMAND...`.

A daemon killed by SIGKILL cannot end its worker, which would hold the GPU and write on. So the
kernel is asked to send the command SIGTERM as soon as the daemon is gone (Linux; elsewhere the
command just runs). The setting survives `exec`.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the command; it never runs if the parent is gone already."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return
    try:
        os.execvp(command[0], command)  # noqa: S606 - that it runs without a shell is the point
    except OSError as error:
        sys.exit(f"worker: {command[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main()
