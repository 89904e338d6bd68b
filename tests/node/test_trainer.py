import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedoap.config import WorkerConfig
from fedoap.errors import StorageError
from fedoap_node.job import JobProgress
from fedoap_node.trainer import Trainer, worker_command


def started(tmp_path: Path, code: str) -> Trainer:
    return Trainer([sys.executable, "-c", code], tmp_path, tmp_path / "worker.log")


def exit_code(trainer: Trainer) -> int:
    deadline = time.monotonic() + 10
    while trainer.exit_code() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    code = trainer.exit_code()
    assert code is not None
    return code


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


def test_several_gpus_are_trained_on_through_the_distributed_launcher() -> None:
    command = worker_command(WorkerConfig(gpus=4), Path("/s/job.json"))

    assert command[1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=4",
        "-m",
        "fedoap_node.worker",
        "/s/job.json",
    ]


def test_the_newest_progress_is_told_and_other_lines_go_to_the_log(tmp_path: Path) -> None:
    lines = [JobProgress(stage="train", step=step, steps=9, loss=0.5).model_dump_json() for step in (1, 2)]
    trainer = started(tmp_path, f"print({lines[0]!r}); print('chatter'); print({lines[1]!r})")
    exit_code(trainer)

    said = trainer.progress()

    trainer.kill()
    assert said is not None
    assert (said.step, said.dice) == (2, -1.0)
    assert (tmp_path / "worker.log").read_text() == "chatter\n"


def test_the_last_words_are_the_last_line_of_this_worker_s_standard_error(tmp_path: Path) -> None:
    (tmp_path / "worker.log").write_text("words of one before\n")
    trainer = started(tmp_path, "import sys; sys.stderr.write('careful\\nno case has a mask\\n\\n'); sys.exit(2)")

    assert exit_code(trainer) == 2
    assert trainer.last_words() == "no case has a mask"
    trainer.kill()


def test_a_worker_that_says_nothing_leaves_none_of_its_forerunner_s_words(tmp_path: Path) -> None:
    (tmp_path / "worker.log").write_text("words of one before\n")
    trainer = started(tmp_path, "pass")
    exit_code(trainer)

    assert trainer.last_words() == "it left no message"
    trainer.kill()


def test_a_line_left_beside_the_job_counts_more_than_what_a_launcher_says_last(tmp_path: Path) -> None:
    """Planted bug: standard error read alone."""
    (tmp_path / "error.txt").write_text("no case has a mask\n")
    trainer = started(tmp_path, "import sys; sys.exit('ChildFailedError: exitcode 2')")
    exit_code(trainer)

    assert trainer.last_words() == "no case has a mask"
    trainer.kill()


def test_a_ruler_is_no_last_word(tmp_path: Path) -> None:
    """Planted bug: the last line that is not blank, which is "=====" after the launcher's report."""
    trainer = started(tmp_path, "import sys; sys.exit('Signal 9 (SIGKILL) received by PID 7\\n' + '=' * 60)")
    exit_code(trainer)

    assert trainer.last_words() == "Signal 9 (SIGKILL) received by PID 7"
    trainer.kill()


def test_ending_a_worker_ends_what_it_started(tmp_path: Path) -> None:
    """Planted bug: a signal to the worker alone, not to its group."""
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    trainer = started(tmp_path, f"{child}; print(p.pid, flush=True); time.sleep(60)")
    log = tmp_path / "worker.log"
    while not log.read_text().strip():
        trainer.progress()
        time.sleep(0.01)

    trainer.end()

    assert is_gone(int(log.read_text()))


def test_a_worker_dies_with_a_daemon_that_was_killed(tmp_path: Path) -> None:
    """Planted bug: the worker started without its leash."""
    daemon = """
import sys, time
from pathlib import Path
from fedoap_node.trainer import Trainer
worker = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
trainer = Trainer([sys.executable, "-c", worker], Path(sys.argv[1]).parent, Path(sys.argv[1]))
while True:
    trainer.progress()
    time.sleep(0.01)
"""
    log = tmp_path / "worker.log"
    parent = subprocess.Popen([sys.executable, "-c", daemon, str(log)])
    while not log.exists() or not log.read_text().strip():
        time.sleep(0.01)

    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()

    assert is_gone(int(log.read_text()))


def test_a_worker_s_group_can_be_killed_after_it_ended(tmp_path: Path) -> None:
    trainer = started(tmp_path, "pass")
    exit_code(trainer)

    trainer.kill()
    trainer.kill()

    assert trainer.exit_code() == 0


def test_a_command_that_is_not_there_ends_with_words_that_name_it(tmp_path: Path) -> None:
    trainer = Trainer(["no-such-worker"], tmp_path, tmp_path / "worker.log")

    assert exit_code(trainer) != 0
    assert "no-such-worker" in trainer.last_words()
    trainer.kill()


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="worker: "):
        Trainer(["true"], tmp_path, tmp_path / "nowhere" / "worker.log")
