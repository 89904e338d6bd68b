"""The processes of a simulation: started in groups of their own, and always ended.

A child's output goes to files that its last lines are quoted from when it fails. Each child leads
its own process group, so that a Ctrl-C reaches the simulation only, which then ends them in order.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Self

from fedoap.errors import ProcessError
from fedoap.simulation.watcher import GRACE_SECONDS, end_groups

QUOTED_LINES = 5


@dataclass(frozen=True, slots=True)
class Child:
    """A process that was started under a name, and the files that it writes to."""

    name: str
    process: "subprocess.Popen[bytes]"
    output: Path
    """Its standard output."""
    log: Path
    """Its standard error."""

    @property
    def code(self) -> int | None:
        """Its exit code, or nothing while it runs."""
        return self.process.poll()

    def last_words(self) -> str:
        """Return how it ended and the last lines of its output, as one line."""
        said = [file.read_text(encoding="utf-8", errors="replace").strip() for file in (self.log, self.output)]
        lines = next((text for text in said if text), "it said nothing").splitlines()
        return f"{self.name} ended with code {self.code}: {' | '.join(lines[-QUOTED_LINES:])}"


class Processes:
    """All children of a simulation; leaving the `with` block ends those that still run."""

    def __init__(self, logs: Path, grace_seconds: float = GRACE_SECONDS) -> None:
        self._logs = logs
        self._grace_seconds = grace_seconds
        self._running: list[Child] = []
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "fedoap.simulation.watcher"], stdin=subprocess.PIPE, start_new_session=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._watcher is not None
        assert self._watcher.stdin is not None
        with _interrupts_ignored():
            self._end(self._running)
            self._watcher.stdin.close()
            self._watcher.wait()

    def start(self, name: str, command: Sequence[str]) -> Child:
        """Start a command; its output goes to `NAME.out` and `NAME.log` in the logs' folder."""
        output, log = self._logs / f"{name}.out", self._logs / f"{name}.log"
        with output.open("wb") as out, log.open("wb") as err:
            child = Child(name, _popen(command, out, err), output, log)
        self._tell_watcher("+", child)
        self._running.append(child)
        return child

    def run(self, name: str, command: Sequence[str]) -> str:
        """Run a command to its end and return what it printed on standard output.

        Raises:
            ProcessError: it failed; with its last lines.
        """
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            text = (done.stderr or done.stdout).strip().splitlines()[-QUOTED_LINES:]
            raise ProcessError(f"{name} ended with code {done.returncode}: {' | '.join(text)}")
        return done.stdout

    def ended(self) -> list[Child]:
        """Return the children that ended since the last call."""
        gone = [child for child in self._running if child.code is not None]
        for child in gone:
            self._forget(child)
        return gone

    def wait(self, children: Sequence[Child], seconds: float) -> None:
        """Wait until the children have ended, then end those that have not."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(child.code is None for child in children):
            time.sleep(0.05)
        self._end([child for child in children if child in self._running])

    def _end(self, children: Sequence[Child]) -> None:
        for child in children:
            child.process.terminate()
        until = time.monotonic() + self._grace_seconds
        while time.monotonic() < until and any(child.code is None for child in children):
            time.sleep(0.05)
        for child in list(children):
            self._forget(child)

    def _forget(self, child: Child) -> None:
        # A leader that is gone may have left workers behind in its group.
        end_groups({child.process.pid}, grace_seconds=0)
        child.process.wait()
        self._running.remove(child)
        self._tell_watcher("-", child)

    def _tell_watcher(self, sign: str, child: Child) -> None:
        assert self._watcher is not None
        assert self._watcher.stdin is not None
        self._watcher.stdin.write(f"{sign}{child.process.pid}\n".encode())
        self._watcher.stdin.flush()


@contextmanager
def termination_raises() -> Iterator[None]:
    """Within, SIGTERM ends the program by an exception, so that what it started is ended too."""
    former = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    former = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _popen(command: Sequence[str], out: IO[bytes], err: IO[bytes]) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        env=environment,
        start_new_session=True,
    )
