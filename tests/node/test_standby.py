import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedoap.config import WorkerConfig
from fedoap_node.standby import Standby, standby_command
from fedoap_node.trainer import Trainer
from tests.node.test_trainer import exit_code, is_gone

WORKER = """
import os, sys
from pathlib import Path
sys.stderr.write("words of the imports\\n")
waited = sys.argv[1] == "-"
job = Path(sys.stdin.readline().strip() if waited else sys.argv[1])
if str(job) == ".":
    sys.exit(0)
(job.parent / "pid").write_text(f"{os.getpid()} {waited}")
sys.exit("no case has a mask")
"""


def config(folder: Path, code: str = WORKER) -> WorkerConfig:
    script = folder / "worker.py"
    script.write_text(code)
    return WorkerConfig(command=(sys.executable, str(script)), keep_warm=True)


@pytest.fixture
def standby(tmp_path: Path) -> Iterator[Standby]:
    standby = Standby(config(tmp_path), tmp_path / "worker.log")
    yield standby
    standby.close()


def waiting(standby: Standby) -> Trainer:
    trainer = standby._waiting
    assert trainer is not None
    return trainer


def done_by(trainer: Trainer, folder: Path) -> tuple[int, bool]:
    """Return the process that did the job, and whether it had waited for it."""
    exit_code(trainer)
    trainer.kill()
    pid, waited = (folder / "pid").read_text().split()
    return int(pid), waited == "True"


def test_the_worker_that_waits_gets_the_job(standby: Standby, tmp_path: Path) -> None:
    standby.prepare()
    pid = waiting(standby)._process.pid

    trainer = standby.take(tmp_path / "job.json")

    assert done_by(trainer, tmp_path) == (pid, True)


def test_one_worker_does_one_job(standby: Standby, tmp_path: Path) -> None:
    """Planted bug: a worker kept when it was taken."""
    standby.prepare()
    first = done_by(standby.take(tmp_path / "job.json"), tmp_path)
    standby.prepare()
    second = done_by(standby.take(tmp_path / "job.json"), tmp_path)

    assert first[0] != second[0]


def test_where_the_one_that_waited_has_died_a_fresh_worker_does_the_job(standby: Standby, tmp_path: Path) -> None:
    """Planted bug: a worker counted as begun when its line was written."""
    standby.prepare()
    os.kill(waiting(standby)._process.pid, signal.SIGKILL)
    exit_code(waiting(standby))

    trainer = standby.take(tmp_path / "job.json")

    assert done_by(trainer, tmp_path)[1] is False


def test_a_worker_that_dies_while_it_waits_is_not_started_over_and_over(standby: Standby) -> None:
    """Planted bug: a fresh one whenever none is alive."""
    standby.prepare()
    dead = waiting(standby)
    os.kill(dead._process.pid, signal.SIGKILL)
    exit_code(dead)

    standby.prepare()

    assert waiting(standby) is dead


def test_a_worker_that_cannot_be_started_to_wait_is_tried_again_with_the_next_job(
    standby: Standby, tmp_path: Path
) -> None:
    """Planted bugs: the error let through, which ends the daemon; tried again at each turn of its loop."""
    (tmp_path / "worker.log").mkdir()
    standby.prepare()
    (tmp_path / "worker.log").rmdir()
    standby.prepare()
    assert standby._waiting is None

    standby.take(tmp_path / "job.json").kill()
    standby.prepare()

    assert waiting(standby).exit_code() is None


def test_its_last_words_begin_with_its_job(tmp_path: Path) -> None:
    """Planted bugs: the log read from where it was when the worker began to wait; one that has ended done over."""
    standby = Standby(config(tmp_path, "import sys; print('bad', file=sys.stderr); input()"), tmp_path / "worker.log")
    standby.prepare()
    while not (tmp_path / "worker.log").read_text():
        time.sleep(0.01)

    trainer = standby.take(tmp_path / "job.json")

    assert exit_code(trainer) == 0
    assert trainer.last_words() == "it left no message"
    trainer.kill()


def test_its_error_is_read_beside_its_job(standby: Standby, tmp_path: Path) -> None:
    standby.prepare()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "error.txt").write_text("what torchrun hid\n")

    trainer = standby.take(tmp_path / "run" / "job.json")

    exit_code(trainer)
    assert trainer.last_words() == "what torchrun hid"
    trainer.kill()


def test_closing_ends_the_worker_that_waits(standby: Standby) -> None:
    standby.prepare()
    pid = waiting(standby)._process.pid

    standby.close()

    assert is_gone(pid)


def test_a_worker_that_waits_dies_with_a_daemon_that_was_killed(tmp_path: Path) -> None:
    """Planted bug: no leash, and a worker still busy with its imports, which reads no input."""
    worker = config(tmp_path, "import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(60)")
    daemon = f"""
import time
from pathlib import Path
from fedoap.config import WorkerConfig
from fedoap_node.standby import Standby
standby = Standby(WorkerConfig(command={worker.command!r}, keep_warm=True), Path({str(tmp_path / "worker.log")!r}))
standby.prepare()
time.sleep(60)
"""
    log = tmp_path / "worker.log"
    parent = subprocess.Popen([sys.executable, "-c", daemon])
    while not log.exists() or not log.read_text().strip():
        time.sleep(0.01)

    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()

    assert is_gone(int(log.read_text()))


@pytest.mark.parametrize(
    "worker",
    [
        WorkerConfig(command=("my_worker",)),
        WorkerConfig(gpus=2),
        WorkerConfig(gpus=2, keep_warm=True),
        WorkerConfig(keep_warm=False),
    ],
)
def test_no_worker_waits_that_could_not_or_is_not_to(worker: WorkerConfig) -> None:
    assert standby_command(worker) is None


def test_fedoap_s_own_worker_waits(tmp_path: Path) -> None:
    command = standby_command(WorkerConfig())
    assert command is not None

    unneeded = subprocess.run(command, input="", capture_output=True, text=True, timeout=60, check=False)
    needed = subprocess.run(
        command, input=f"{tmp_path}/no.json\n", capture_output=True, text=True, timeout=60, check=False
    )

    assert (unneeded.returncode, unneeded.stderr) == (0, "")
    assert needed.returncode == 2
    assert "no.json: cannot be read: No such file or directory" in needed.stderr
