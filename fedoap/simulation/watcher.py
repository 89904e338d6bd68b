"""Ends what is left of a simulation whose own process is gone.

Reads lines `+PID` and `-PID` from standard input. At its end, which comes even when the simulation
is killed outright, every process group still listed gets SIGTERM and, after a while, SIGKILL.
"""

import contextlib
import os
import signal
import sys
import time

GRACE_SECONDS = 10.0


def main() -> None:
    """Follow standard input to its end, then end the process groups still listed there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    end_groups(groups)


def end_groups(groups: set[int], grace_seconds: float = GRACE_SECONDS) -> None:
    """End process groups: SIGTERM, then SIGKILL to those that are not gone after the grace period."""
    _signal_all(groups, signal.SIGTERM)
    until = time.monotonic() + grace_seconds
    while time.monotonic() < until and any(_is_there(group) for group in groups):
        time.sleep(0.05)
    _signal_all(groups, signal.SIGKILL)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _signal_all(groups: set[int], number: signal.Signals) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)


if __name__ == "__main__":
    main()
