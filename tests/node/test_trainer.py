import errno
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


def test_a_worker_that_cannot_be_watched_counts_as_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bugs: the system's error let through, at which the daemon ends; the worker left running."""

    def none_left(_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", none_left)

    before = len(psutil.Process().children())

    with pytest.raises(StorageError, match=r"worker: .* cannot be started: Too many open files"):
        started(tmp_path, "import time; time.sleep(60)")

    assert len(psutil.Process().children()) == before


def test_a_worker_that_prints_without_end_leaves_the_daemon_time_for_the_rest(tmp_path: Path) -> None:
    """Planted bugs: output read until there is none; a line kept however long it grows."""
    trainer = started(tmp_path, "import sys\nwhile True: sys.stdout.write('x' * 65536)")
    until = time.monotonic() + 1

    while time.monotonic() < until:
        trainer.progress()

    assert len(trainer._pending) <= 2 << 20
    trainer.kill()


@pytest.mark.parametrize("step", [-1, 2**31, 10**30])
def test_a_step_that_no_message_can_carry_is_no_progress(tmp_path: Path, step: int) -> None:
    """Planted bug: any whole number, at which the daemon's codec fails."""
    line = f'{{"stage": "train", "step": {step}, "steps": 9, "loss": 0.5}}'
    trainer = started(tmp_path, f"print({line!r})")
    exit_code(trainer)

    assert trainer.progress() is None
    assert (tmp_path / "worker.log").read_text() == f"{line}\n"
    trainer.kill()


def test_a_worker_without_an_input_is_done_when_it_ends(tmp_path: Path) -> None:
    """Planted bug: one that can take no other job kept for the next."""
    trainer = started(tmp_path, "print('{\"done\": true}')")
    exit_code(trainer)

    trainer.progress()

    assert not trainer.has_done()
    trainer.kill()


def test_the_log_may_be_taken_away_at_any_time(tmp_path: Path) -> None:
    """Planted bug: the system's error let through, which ends the daemon when its worker fails."""
    log = tmp_path / "worker.log"
    waiting = Trainer([sys.executable, "-c", "input(); raise SystemExit('bad')"], None, log)
    log.unlink()

    assert waiting.begin(tmp_path / "job.json")
    exit_code(waiting)

    assert waiting.last_words() == "it left no message"
    waiting.kill()


class Undying(subprocess.Popen[bytes]):
    """A process that hangs in a driver: no signal ends it."""

    def wait(self, timeout: float | None = None) -> int:
        assert timeout is not None, "waits for ever"
        raise subprocess.TimeoutExpired(self.args, timeout)


def test_a_worker_that_outlasts_sigkill_does_not_hold_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: `wait` without an end."""
    monkeypatch.setattr(subprocess, "Popen", Undying)
    trainer = started(tmp_path, "import time; time.sleep(60)")
    monkeypatch.undo()

    trainer.kill()

    assert subprocess.Popen.wait(trainer._process) == -signal.SIGKILL
