"""The worker that waits: started before there is a job, so that its imports are done when one comes.

Importing PyTorch and MONAI takes seconds, setting up the GPU and reading the images some more: nothing beside
an hour of training, but most of a short task. So fedoap's own worker stays for a while after a job, and one
process a site can do a federation of many short rounds. A worker that has not had a job yet touches no GPU.
A worker ends when it fails, or has waited for `worker.stay_seconds`. A command of the site's own finds the
end of its input behind its first job, unless that setting says that it stays too.
"""

import sys
import time
from pathlib import Path

from fedoap.config import WorkerConfig
from fedoap.errors import StorageError
from fedoap_node.trainer import Trainer, worker_command

ON_STANDARD_INPUT = "-"
"""In place of the job's path: it comes as a line of standard input."""
STAY_SECONDS = 60.0
"""How long fedoap's own worker stays where nothing else is set."""


def standby_command(worker: WorkerConfig) -> list[str] | None:
    """Return the command line of a worker that waits for its job, or nothing where none can or is to.

    >>> standby_command(WorkerConfig(command=("my_worker",), keep_warm=True))
    ['my_worker', '-']
    """
    wanted = worker.command is None if worker.keep_warm is None else worker.keep_warm
    if not wanted or (worker.command is None and worker.gpus > 1):  # the launcher's processes share no input
        return None
    return [*(worker.command or (sys.executable, "-m", "fedoap_node.worker")), ON_STANDARD_INPUT]


class Standby:
    """At most one worker that waits: a fresh one, or for a while the one that did the last job."""

    def __init__(self, worker: WorkerConfig, log: Path) -> None:
        self._worker, self._log = worker, log
        own = STAY_SECONDS if worker.command is None else 0.0
        self._stay_seconds = own if worker.stay_seconds is None else worker.stay_seconds
        self._waiting: Trainer | None = None
        self._has_failed = False
        self._until: float | None = None
        """When a worker ends that waits for another job; a fresh one waits without end."""

    def prepare(self) -> None:
        """Let a worker wait; one that has died, or did not start, is not replaced before the next job has shown why."""
        if self._until is not None and time.monotonic() > self._until:
            self.close()
        command = standby_command(self._worker)
        if self._waiting is None and command is not None and not self._has_failed:
            try:
                self._waiting = Trainer(command, None, self._log)
            except StorageError:
                self._has_failed = True

    def take(self, job: Path) -> Trainer:
        """Return a worker that does the job: the one that waits, else a fresh one.

        Raises:
            StorageError: it cannot be started.
        """
        waiting, self._waiting, self._until, self._has_failed = self._waiting, None, None, False
        if waiting is not None:
            if waiting.begin(job, last=self._stay_seconds == 0):
                return waiting
            waiting.kill()
        return Trainer(worker_command(self._worker, job), job.parent, self._log)

    def keep(self, worker: Trainer) -> None:
        """Let a worker wait that has done its job."""
        self.close()
        self._waiting, self._until = worker, time.monotonic() + self._stay_seconds

    def close(self) -> None:
        """End the worker that waits, if one does."""
        waiting, self._waiting, self._until = self._waiting, None, None
        if waiting is not None:
            waiting.kill()
