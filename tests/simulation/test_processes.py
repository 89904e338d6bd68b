"""Nothing that a simulation starts outlives it, however it ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedoap.errors import ProcessError
from fedoap.simulation.processes import Child, Processes

PYTHON = sys.executable
SLEEPER = [PYTHON, "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [
    PYTHON,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]
PARENT = [
    PYTHON,
    "-c",
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(60)",
]


def test_leaving_by_an_exception_ends_every_child(tmp_path: Path) -> None:
    """Planted bug: children that are only forgotten on leaving."""
    children: list[Child] = []

    def fail() -> None:
        with Processes(tmp_path) as processes:
            children.extend(processes.start(f"c{i}", SLEEPER) for i in range(3))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [child.name for child in children if psutil.pid_exists(child.process.pid)] == []


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    with Processes(tmp_path, grace_seconds=0.2) as processes:
        child = processes.start("stubborn", STUBBORN)
        _await_output(child.output)

    assert child.code == -signal.SIGKILL


def test_what_a_child_started_ends_with_it(tmp_path: Path) -> None:
    """Planted bug: a signal to the child alone instead of its group."""
    with Processes(tmp_path) as processes:
        child = processes.start("parent", PARENT)
        grandchild = int(_await_output(child.output))
        child.process.kill()
        child.process.wait()

        assert [gone.name for gone in processes.ended()] == ["parent"]

    until = time.monotonic() + 5
    while _is_running(grandchild):  # the kernel takes a moment to bury what was killed
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_simulation_that_is_killed_outright_leaves_nothing_behind(tmp_path: Path) -> None:
    """Planted bug: a watcher that ends nothing."""
    script = (
        "import sys, time, pathlib\n"
        "from fedoap.simulation.processes import Processes\n"
        "with Processes(pathlib.Path(sys.argv[1])) as processes:\n"
        f"    child = processes.start('sleeper', {SLEEPER!r})\n"
        "    print(child.process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    simulation = subprocess.Popen([PYTHON, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert simulation.stdout is not None
    child = int(simulation.stdout.readline())
    _await_output(tmp_path / "sleeper.out")

    simulation.kill()
    simulation.communicate()

    assert _await_end(child)


def test_a_failed_child_is_quoted(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        child = processes.start("node", [PYTHON, "-c", "import sys; print('one\\ntwo', file=sys.stderr); sys.exit(3)"])
        child.process.wait()

        assert child.last_words() == "node ended with code 3: one | two"


def test_a_failed_command_is_an_error_of_one_line(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes, pytest.raises(ProcessError, match="join a ended with code 2: no such token"):
        processes.run("join a", [PYTHON, "-c", "import sys; print('no such token', file=sys.stderr); sys.exit(2)"])


def test_a_wait_ends_what_takes_too_long(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        child = processes.start("slow", SLEEPER)
        processes.wait([child], seconds=0.1)

        assert child.code is not None


def _await_output(path: Path) -> str:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if path.exists() and (text := path.read_text()).endswith("\n"):
            return text
        time.sleep(0.02)
    raise TimeoutError(path)


def _await_end(pid: int) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if not _is_running(pid):
            return True
        time.sleep(0.02)
    return False


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
