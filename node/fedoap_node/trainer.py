"""The worker process: started for one job, listened to, ended with everything that it started."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from fedoap.config import WorkerConfig
from fedoap.errors import StorageError
from fedoap_node import leash
from fedoap_node.job import ERROR, JobDone, JobProgress
from fedoap_node.journal import rotate

READ_BYTES = 1 << 16
MOST_READS = 16
"""In one turn: a worker that prints without end must not keep the daemon from its other work."""
LONGEST_LINE = 1 << 20
WORDS = re.compile(r"\w")
GRACE_SECONDS = 10.0
"""A worker that was asked to end is killed after this long."""
KILL_SECONDS = 2.0
"""How long a killed worker is waited for: one that hangs in a driver outlasts even SIGKILL."""


def worker_command(worker: WorkerConfig, job: Path) -> list[str]:
    """Return the command line that runs a job.

    >>> worker_command(WorkerConfig(command=("my_worker", "--fast")), Path("/s/job.json"))
    ['my_worker', '--fast', '/s/job.json']
    """
    if worker.command:
        return [*worker.command, str(job)]
    module = ["-m", "fedoap_node.worker", str(job)]
    if worker.gpus > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={worker.gpus}"]
        return [sys.executable, *launcher, *module]
    return [sys.executable, *module]


class Trainer:
    """One worker that runs, or waits for its job.

    Args:
        command: what to run.
        output: folder in which the worker may leave `error.txt`; None where it waits until `begin`.
        log: file that its standard error is appended to.

    Raises:
        StorageError: it cannot be started.
    """

    def __init__(self, command: list[str], output: Path | None, log: Path) -> None:
        self._output, self._log = output, log
        self._heard = time.monotonic()
        self._pending = b""
        leashed = [sys.executable, "-I", "-S", str(Path(leash.__file__)), str(os.getpid()), *command]
        try:
            rotate(log)
            self._log_start = _size(log)
            with log.open("ab") as errors:
                self._process = subprocess.Popen(
                    leashed,
                    bufsize=0,
                    stdin=subprocess.PIPE if output is None else subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                )
        except OSError as error:
            raise _not_started(command, error) from None
        assert self._process.stdout is not None
        self._stdout: IO[bytes] = self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)
        self._talks, self._has_done = True, False
        self._ended = -1
        try:
            self._ended = os.pidfd_open(self._process.pid)
        except OSError as error:
            self.kill()
            raise _not_started(command, error) from None

    def begin(self, job: Path, *, last: bool = True) -> bool:
        """Give a worker that waits its job; return whether it was still there to take it.

        The worker ends after its last one: it may have done so before this returns.
        """
        assert self._process.stdin is not None
        self._output, self._log_start, self._has_done = job.parent, _size(self._log), False
        self._heard = time.monotonic()
        try:
            self._process.stdin.write(os.fsencode(job) + b"\n")
            if last:
                self._process.stdin.close()
        except BrokenPipeError:
            return False
        return True

    def descriptors(self) -> list[int]:
        """Return what becomes readable when the worker has said something or ended."""
        return [self._ended, *([self._stdout.fileno()] if self._talks else [])]

    def progress(self) -> JobProgress | None:
        """Return the newest progress that has arrived since the last call; other lines go to its log."""
        newest, others = None, list[bytes]()
        for line in self._lines():
            match _said(line):
                case JobProgress() as progress:
                    newest = progress
                case JobDone():
                    self._has_done = self._process.stdin is not None  # else it has no way to wait for more
                case None:
                    others.append(line + b"\n")
        if others:
            with self._log.open("ab") as log:
                log.writelines(others)
        return newest

    def has_done(self) -> bool:
        """Return whether the worker has said, as far as `progress` has heard, that its job is done and it waits."""
        return self._has_done

    def silent_seconds(self) -> float:
        """Return for how long the worker has said nothing about its job."""
        return time.monotonic() - self._heard

    def exit_code(self) -> int | None:
        """Return the exit code, or nothing while the worker runs."""
        return self._process.poll()

    def last_words(self) -> str:
        """Return the line that says why the worker failed: its `error.txt`, else its last on standard error."""
        said = _tail(self._output / ERROR, 0) if self._output else ""
        lines = (said or _tail(self._log, self._log_start)).split("\n")
        # the distributed launcher ends its report by a ruler
        return next((line.strip() for line in reversed(lines) if WORDS.search(line)), "it left no message")

    def ask_to_end(self) -> None:
        """Ask the worker's process group to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the worker's process group at once and release everything held for it."""
        self._signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)
        self.close()

    def end(self) -> None:
        """End the worker: asked first, killed after a while; returns when it is gone."""
        self.ask_to_end()
        deadline = time.monotonic() + GRACE_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        self.kill()

    def close(self) -> None:
        """Release the descriptors of a worker that has ended."""
        self._stdout.close()
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._ended >= 0:
            os.close(self._ended)
            self._ended = -1

    def _lines(self) -> list[bytes]:
        for _ in range(MOST_READS):
            try:
                data = os.read(self._stdout.fileno(), READ_BYTES)
            except BlockingIOError:
                break
            if not data:
                self._talks = False
                break
            self._heard = time.monotonic()
            self._pending += data
        *lines, self._pending = self._pending.split(b"\n")
        if len(self._pending) > LONGEST_LINE:
            lines, self._pending = [*lines, self._pending], b""
        return lines

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def _not_started(command: list[str], error: OSError) -> StorageError:
    return StorageError(f"worker: {command[0]} cannot be started: {error.strerror}")


def _said(line: bytes) -> JobProgress | JobDone | None:
    for kind in (JobProgress, JobDone):
        with suppress(ValidationError):
            return kind.model_validate_json(line)
    return None


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0


def _tail(path: Path, start: int) -> str:
    """Return the end of a file, from byte `start` at the earliest; nothing if somebody has taken it away."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - READ_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
