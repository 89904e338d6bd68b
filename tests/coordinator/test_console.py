"""What the operator sees, and what the log keeps."""

import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from fedoap.protocol.events import Note
from fedoap.protocol.status import SiteStatus, Status
from fedoap_coordinator.console import PlainConsole, TableConsole, View, open_console, sentence, waited_for
from fedoap_coordinator.journal import LINES_A_MINUTE, Journal
from tests.coordinator.conftest import Clock

NOON = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
WORKING = SiteStatus("hospital_a", "working", 1.0, "train", 20, 50, 0.5, 0.75)
SILENT = SiteStatus("hospital_b", "silent", 63.0)
DONE = SiteStatus("hospital_c", "committed", 2.0)
UPLOADING = SiteStatus("hospital_d", "uploading", 0.1, received=10_000_000, size=200_000_000)


def status(*sites: SiteStatus, reason: str = "") -> Status:
    return Status("waiting" if reason else "open", reason, "train", 3, 20, 1, 60.0, 3600.0, sites)


def progress(step: int, dice: float = 0.75) -> Note:
    fields: dict[str, str | int | float] = {"site": "hospital_a", "kind": "train", "round": 3, "stage": "train"}
    return Note("site_progress", fields | {"step": step, "steps": 50, "loss": 0.5, "dice": dice})


def test_who_is_waited_for_since_when_and_until_when() -> None:
    assert waited_for(status(WORKING, SILENT, DONE), NOON) == (
        "waiting for hospital_a, hospital_b (silent for 63 s) since 11:59:00, until 13:00:00 at most"
    )
    assert waited_for(status(reason="2 of 3 sites are here"), NOON) == "2 of 3 sites are here"


def test_a_note_is_a_sentence_and_an_unknown_or_incomplete_one_is_still_shown() -> None:
    """Planted bug: ` was refused`, without a subject, for a key that nobody knows."""
    assert sentence(Note("ready", {"endpoint": "tcp://[::1]:7"})) == "ready tcp://[::1]:7"
    assert sentence(progress(20)) == "hospital_a: train of round 3, step 20/50, loss 0.5000, Dice 0.750"
    assert sentence(progress(20, dice=-1.0)) == "hospital_a: train of round 3, step 20/50, loss 0.5000"
    knock: dict[str, str | int | float] = {"site": "", "code": "unknown_site", "reason": "key ab is not enrolled"}
    assert sentence(Note("refused", knock)) == "somebody was refused (unknown_site): key ab is not enrolled"
    assert sentence(Note("site_progress", {"site": "a"})) == "site_progress site=a"
    assert sentence(Note("novelty", {"x": 1})) == "novelty x=1"


def test_what_comes_after_the_last_round_is_no_round() -> None:
    """Planted bug: `round 21` of 20 in the table's head."""
    fields: dict[str, str | int | float] = {"kind": "calibrate", "round": 21, "attempt": 1}
    assert sentence(Note("task_opened", fields)) == "calibration begins, attempt 1"
    assert sentence(Note("task_opened", fields | {"kind": "bank"})) == "bank after round 20 begins, attempt 1"
    told: dict[str, str | int | float] = {"site": "a", "stage": "boundary", "step": 1, "steps": 2, "loss": 1.0}
    assert sentence(Note("site_progress", fields | told)) == "a: calibration (boundary), step 1/2, loss 1.0000"
    out = io.StringIO()
    console = TableConsole(Terminal(file=out, force_terminal=True, width=120))
    console.show(View(replace(status(WORKING), kind="calibrate", round=21), {}, 0.0))
    console.close()
    assert "calibration  calibrate  open" in out.getvalue()
    assert "round 21" not in out.getvalue()


def test_a_reason_that_counts_seconds_is_one_line() -> None:
    """Planted bug: a line a second, as long as a site was away or an attempt had to wait."""
    out = io.StringIO()
    console = PlainConsole(Terminal(file=out, width=120), Clock())
    for seconds in (63, 64, 65):
        console.show(View(status(reason=f"1 of 2 sites are here: waiting for b (silent for {seconds} s)"), {}, 0.0))
    console.show(View(status(reason="train of round 3 is tried again in 30 s; it failed because of b"), {}, 0.0))
    console.show(View(status(reason="train of round 3 is tried again in 29 s; it failed because of b"), {}, 0.0))

    assert [line[9:34] for line in out.getvalue().splitlines()] == [
        "1 of 2 sites are here: wa",
        "train of round 3 is tried",
    ]


def test_plain_lines_hold_no_markup_and_progress_comes_now_and_then() -> None:
    out, clock = io.StringIO(), Clock()
    console = PlainConsole(Terminal(file=out, width=40), clock)
    for step in range(10):
        console.note(progress(step))
    clock.now += 16.0
    console.note(progress(11))
    console.note(Note("site_failed", {"site": "hospital_b", "reason": "[red]" + "long reason " * 10}))
    for _ in range(3):
        console.show(View(status(WORKING), {}, 0.0))

    lines = [line[9:] for line in out.getvalue().splitlines()]

    assert [line[:40] for line in lines] == [
        "hospital_a: train of round 3, step 0/50,",
        "hospital_a: train of round 3, step 11/50",
        "hospital_b failed: [red]long reason long",
        "waiting for hospital_a since " + lines[-1][29:40],
    ]


def test_the_table_shows_pace_and_time_left() -> None:
    out = io.StringIO()
    console = TableConsole(Terminal(file=out, force_terminal=True, width=120))
    console.show(View(status(WORKING, UPLOADING), {}, 100.0))
    later = SiteStatus("hospital_a", "working", 1.0, "train", 30, 50, 0.5, 0.75)
    console.show(View(status(later, UPLOADING), {"hospital_d": 20_000_000}, 110.0))
    console.close()

    drawn = out.getvalue()

    assert "30/50" in drawn
    assert "0:00:20" in drawn  # 10 steps in 10 seconds, 20 to go
    assert "2.0" in drawn
    assert "0:01:35" in drawn  # 190 MB at 2 MB/s
    assert "round 3 of 20" in drawn


@pytest.mark.parametrize(("stage", "steps"), [("[/]", 50), ("[link=x]", 50), ("train", 2**31)])
def test_no_progress_that_a_site_may_report_ends_the_console(stage: str, steps: int) -> None:
    """Planted bugs: a stage is read as markup; the time left is more than a `timedelta` holds."""
    out = io.StringIO()
    console = TableConsole(Terminal(file=out, force_terminal=True, width=120))
    for step, now in ((0, 0.0), (1, 100_000.0)):
        console.show(View(status(replace(WORKING, stage=stage, step=step, steps=steps)), {}, now))
    console.close()

    assert stage in out.getvalue()
    assert f"1/{steps}" in out.getvalue()


def test_the_console_suits_the_terminal() -> None:
    table = open_console(Terminal(file=io.StringIO(), force_terminal=True), Clock())

    assert isinstance(table, TableConsole)
    assert isinstance(open_console(Terminal(file=io.StringIO()), Clock()), PlainConsole)
    table.close()


def test_the_log_is_json_with_time_level_and_event(tmp_path: Path) -> None:
    with Journal(tmp_path / "log.jsonl", Clock()) as journal:
        journal.write(Note("ready", {"endpoint": "tcp://127.0.0.1:7"}))
        journal.write(Note("site_failed", {"site": "hospital_a", "reason": "no\nspace"}))

    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())

    assert first == {
        "time": "2023-11-14T22:13:20.000+00:00",
        "level": "info",
        "event": "ready",
        "endpoint": "tcp://127.0.0.1:7",
    }
    assert (second["level"], second["reason"]) == ("warning", "no\nspace")


def test_no_site_can_fill_the_log_by_what_is_no_refusal(tmp_path: Path) -> None:
    """Planted bug: each `progress` that a site sends, and each `bye` and `hello`, is a line."""
    clock = Clock()
    with Journal(tmp_path / "log.jsonl", clock) as journal:
        flooded = [journal.write(progress(step)) for step in range(LINES_A_MINUTE + 7)]
        other = journal.write(Note("site_joined", {"site": "hospital_b"})), journal.write(Note("finished"))
        clock.now += 60.0
        later = journal.write(progress(0))

    assert sum(flooded) == LINES_A_MINUTE
    assert (*other, later) == (True, True, True)


@pytest.mark.parametrize(("refusals", "lines"), [(5, 5), (1000, 15)])
def test_refusals_that_repeat_do_not_fill_the_log(tmp_path: Path, refusals: int, lines: int) -> None:
    with Journal(tmp_path / "log.jsonl", Clock()) as journal:
        for _ in range(refusals):
            journal.write(Note("refused", {"site": "hospital_a", "code": "malformed", "reason": "x"}))

    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == lines
