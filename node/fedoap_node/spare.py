"""The worker that waits: started before there is a job, so that its imports are done when one comes.

Importing PyTorch and MONAI takes seconds a task, nothing beside an hour of training and all of a short
task. Each worker still does one job and ends, so nothing that a job left in memory or on the GPU
outlives it, and the spare touches no GPU before it has its job.
"""

import sys
from pathlib import Path

from fedoap.config import WorkerConfig
from fedoap_node.trainer import Trainer, worker_command

ON_STANDARD_INPUT = "-"
"""In place of the job's path: it comes as a line of standard input."""


def spare_command(worker: WorkerConfig) -> list[str] | None:
    """Return the command line of a worker that waits for its job; none where it could not, or need not.

    >>> spare_command(WorkerConfig(command=("my_worker",), keep_warm=True))
    ['my_worker', '-']
    """
    wanted = worker.command is None if worker.keep_warm is None else worker.keep_warm
    if not wanted or (worker.command is None and worker.gpus > 1):  # the launcher's processes share no input
        return None
    return [*(worker.command or (sys.executable, "-m", "fedoap_node.worker")), ON_STANDARD_INPUT]


class Spare:
    """At most one worker that waits."""

    def __init__(self, worker: WorkerConfig, log: Path) -> None:
        self._worker, self._log = worker, log
        self._waiting: Trainer | None = None

    def prepare(self) -> None:
        """Let a worker wait; one that has died is not replaced before the next job has shown why."""
        command = spare_command(self._worker)
        if self._waiting is None and command is not None:
            self._waiting = Trainer(command, None, self._log)

    def take(self, job: Path) -> Trainer:
        """Return a worker that does the job: the one that waits, else a fresh one.

        Raises:
            StorageError: it cannot be started.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            if waiting.begin(job):
                return waiting
            waiting.kill()
        return Trainer(worker_command(self._worker, job), job.parent, self._log)

    def close(self) -> None:
        """End the worker that waits, if one does."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.kill()
