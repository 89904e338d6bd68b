"""Where runs run: an own process each, here or as tasks of Ray, of which a small one stands in."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fedoap.errors import ConfigError
from fedoap.simulation.processes import Processes
from fedoap.study.executors import Ended, Executor, HereExecutor, Place, RayExecutor, open_executor


def test_a_run_that_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    """Planted bug: the fault names the run, which the study does again."""
    place = Place(tmp_path / "logs", tmp_path, 1)
    with Processes(place.logs) as processes:
        (ended,) = wait(HereExecutor(processes, place), "one", tmp_path / "nowhere")

    assert ended.name == "one"
    assert ended.fault is not None
    assert ended.fault.startswith("ended with code 2: ")
    assert "run.json: is no run of a study" in ended.fault


def test_ray_runs_the_same_command(tmp_path: Path) -> None:
    """Planted bug: a task that passes over the exit code."""
    ray = SmallRay()

    (ended,) = wait(RayExecutor(ray, Place(tmp_path, tmp_path, 3)), "one", tmp_path / "nowhere")

    assert ray.cores == 3
    assert ended.fault is not None
    assert ended.fault.startswith("ended with code 2: ")
    assert "run.json: is no run of a study" in ended.fault


def test_a_task_that_ray_loses_is_a_failed_run(tmp_path: Path) -> None:
    """Planted bug: Ray's own errors end the study."""
    ray = SmallRay(loses=True)

    (ended,) = wait(RayExecutor(ray, Place(tmp_path, tmp_path, 1)), "one", tmp_path)

    assert ended == Ended("one", "lost by Ray: the node died")


def test_without_ray_its_option_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(ConfigError, match=r"--ray needs Ray; install it with: pip install 'fedoap\[ray\]'"):  # noqa: SIM117
        with open_executor(Place(tmp_path, tmp_path, 1), on_ray=True):
            pass


class SmallRay(ModuleType):
    """What of Ray is used, in this process: a task is done when it is asked for."""

    def __init__(self, *, loses: bool = False) -> None:
        super().__init__("ray")
        self.cores, self._loses = 0, loses

    def remote(self, *, num_cpus: int) -> Callable[[Callable[..., object]], SimpleNamespace]:
        """Return what makes a task of a function."""
        self.cores = num_cpus
        return self._task

    def _task(self, function: Callable[..., object]) -> SimpleNamespace:
        self._function = function
        return SimpleNamespace(remote=lambda *arguments: arguments)

    def wait(self, tasks: list[object], *, num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        """Return tasks that are done, and those that are not."""
        assert num_returns == len(tasks)
        assert timeout == 0
        return tasks, []

    def get(self, task: object) -> object:
        """Return what a task gave."""
        if self._loses:
            raise ConnectionError("the node\ndied")
        assert isinstance(task, tuple)
        return self._function(*task)


def wait(executor: Executor, name: str, folder: Path) -> list[Ended]:
    """Return the runs that ended, once one has."""
    executor.start(name, folder)
    until = time.monotonic() + 60
    while not (ended := executor.ended()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return ended
