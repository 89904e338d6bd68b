"""The log: what a coordinator can make it hold, and what a full disk does to it."""

import io
import json
from pathlib import Path

import pytest

from fedoap_node import journal as journal_module
from fedoap_node.journal import Journal


def test_a_log_that_grows_is_moved_aside_while_the_node_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that sends nonsense at full speed must not fill the disk. Planted bug: moved at a start alone."""
    monkeypatch.setattr(journal_module, "MAX_LOG_BYTES", 1000)
    journal = Journal(tmp_path / "log.jsonl", "a", io.StringIO())

    for _ in range(200):
        journal.note("malformed", "coordinator sent nonsense", level="warning")
    journal.close()

    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "log.jsonl.1"}
    assert all(path.stat().st_size < 1200 for path in tmp_path.iterdir())
    assert {json.loads(line)["event"] for line in (tmp_path / "log.jsonl.1").read_text().splitlines()} == {"malformed"}


def test_what_the_coordinator_says_is_one_line_that_commands_no_terminal(tmp_path: Path) -> None:
    """Planted bug: the text as it came, which can clear the screen and pass for other lines."""
    console = io.StringIO()
    journal = Journal(tmp_path / "log.jsonl", "a", console)
    forged = "stopped\n12:00:00 a: all is well\x1b[2J\u202e"

    journal.note("stopped", f"the federation has stopped: {forged}", reason=forged)
    journal.record("task_refused", "warning", {"reason": forged})
    journal.close()

    lines = console.getvalue().splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["reason"] == forged


def test_a_full_disk_is_said_at_the_line_that_it_refuses_and_not_again_at_the_end(tmp_path: Path) -> None:
    """Planted bug: a buffer, which is written again when the log is closed, and hides what went wrong before."""
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    journal = Journal(tmp_path / "log.jsonl", "a", io.StringIO())

    with pytest.raises(OSError, match="No space left on device"):
        journal.note("started", "begins")

    journal.close()
