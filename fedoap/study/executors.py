"""Where runs run: as processes of this machine, or on a Ray cluster.

Either starts `python -m fedoap.study.run`, an OS process of its own for each run, and tells what
became of it. Ray's workers need the study's folder, and the images, under the same paths.
"""

# ruff: noqa: PLC0415

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Protocol

from fedoap.errors import ConfigError
from fedoap.simulation.federation import Log
from fedoap.simulation.processes import QUOTED_LINES, Child, Processes

RAY_MISSING = "--ray needs Ray; install it with: pip install 'fedoap[ray]'"


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that has ended, and, if it has no figures, one line that says why."""

    name: str
    fault: str | None


class Executor(Protocol):
    """Runs what is prepared in a folder; a run is known by its name."""

    def start(self, name: str, folder: Path) -> None:
        """Start a run."""

    def ended(self) -> list[Ended]:
        """Return the runs that ended since the last call."""

    def lines(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        """Yield what the runs under way have printed since the last call, with their names."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where runs keep their output and prepared cases, and how many threads each has."""

    logs: Path
    cache: Path
    threads: int

    def command(self, folder: Path) -> tuple[str, ...]:
        """Return the command of a run."""
        return (sys.executable, "-m", "fedoap.study.run", str(folder), str(self.cache))


class Executors(Protocol):
    """Opens an executor."""

    def __call__(self, place: Place, *, on_ray: bool) -> AbstractContextManager[Executor]:
        """Return a context within which runs can be started."""


@dataclass(slots=True)
class HereExecutor:
    """Children of this process; they end with it, whatever ends it."""

    processes: Processes
    place: Place
    _running: dict[str, tuple[Child, Log]] = field(default_factory=dict)

    def start(self, name: str, folder: Path) -> None:
        """Start a run as a child."""
        child = self.processes.start(name, self.place.command(folder))
        self._running[name] = (child, Log(child.output))

    def ended(self) -> list[Ended]:
        """Return the children that ended."""
        found = []
        for child in self.processes.ended():
            del self._running[child.name]
            found.append(Ended(child.name, child.last_words().removeprefix(f"{child.name} ") if child.code else None))
        return found

    def lines(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        """Yield the children's progress."""
        for name, (_, log) in self._running.items():
            yield from ((name, line) for line in log.new())


@dataclass(slots=True)
class RayExecutor:
    """Tasks of a Ray cluster, each of which starts the run's process where it has cores for it."""

    ray: ModuleType
    place: Place
    _running: dict[object, str] = field(default_factory=dict)

    def start(self, name: str, folder: Path) -> None:
        """Submit a run."""
        task: Callable[..., object] = self.ray.remote(num_cpus=max(1, self.place.threads))(_outcome).remote
        self._running[task(self.place.command(folder))] = name

    def ended(self) -> list[Ended]:
        """Return the tasks that ended."""
        if not self._running:
            return []
        done, _ = self.ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [Ended(self._running.pop(task), _fault(self.ray, task)) for task in done]

    def lines(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        """Yield nothing: what a run prints stays where it runs."""
        yield from ()


@contextmanager
def open_executor(place: Place, *, on_ray: bool) -> Iterator[Executor]:
    """Within, runs can be started; at its end none is left on this machine.

    Raises:
        ConfigError: Ray is wanted and not installed.
    """
    if not on_ray:
        with Processes(place.logs) as processes:
            yield HereExecutor(processes, place)
        return
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError(RAY_MISSING) from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    try:
        yield RayExecutor(ray, place)
    finally:
        ray.shutdown()


def _outcome(run: tuple[str, ...]) -> str | None:
    """Run a command to its end and return why it failed, if it did."""
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    said = (done.stderr or done.stdout).strip().splitlines()[-QUOTED_LINES:]
    return f"ended with code {done.returncode}: {' | '.join(said)}"


def _fault(ray: ModuleType, task: object) -> str | None:
    try:
        found: str | None = ray.get(task)
    except Exception as error:  # noqa: BLE001 - whatever befell the cluster, the other runs go on
        return f"lost by Ray: {' '.join(str(error).split())}"
    return found
