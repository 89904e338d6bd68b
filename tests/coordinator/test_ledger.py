"""The ledger: rows that outlast a crash, and a roster that two processes share."""

import hashlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from fedoap.chain import Link, Outcome, Weighed, check_chain
from fedoap.errors import ConfigError, DiskError, StorageError
from fedoap.identity import Member
from fedoap.manifests import BlobManifest, TaskManifest, UploadManifest
from fedoap.protocol.events import RecordClosed
from fedoap_coordinator.damage import ledger_error, told
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.rows import Cell
from tests.coordinator.conftest import FEDERATION_KEYS, Maker, notary


def test_every_commit_reaches_the_disk_before_the_method_returns(ledger: Ledger) -> None:
    (journal,), (level,) = (next(ledger._run(f"pragma {name}")) for name in ("journal_mode", "synchronous"))

    assert (journal, level) == ("wal", 2)


def test_the_epoch_grows_with_each_change_of_the_roster(ledger: Ledger, member: Callable[[str], Member]) -> None:
    ledger.enrol(b"t" * 32, member("hospital_a"), 1.0)
    joined = ledger.roster()
    ledger.revoke("hospital_a", 2.0)
    revoked = ledger.roster()

    assert (joined.epoch, revoked.epoch) == (1, 2)
    assert joined.active("hospital_a") is not None
    assert revoked.active("hospital_a") is None
    assert revoked.find("hospital_a") is not None


def test_a_site_that_joins_again_has_its_new_keys_only(ledger: Ledger, member: Callable[[str], Member]) -> None:
    first, second = member("hospital_a"), member("hospital_a")
    ledger.enrol(b"t" * 32, first, 1.0)
    ledger.revoke("hospital_a", 2.0)

    ledger.enrol(b"u" * 32, second, 3.0)

    assert ledger.roster().members == (second,)


def test_a_newer_invitation_withdraws_the_unused_one(ledger: Ledger) -> None:
    ledger.add_invite(b"1" * 32, "hospital_a", 1.0, 100)
    ledger.add_invite(b"2" * 32, "hospital_a", 2.0, 100)

    assert [invite.withdrawn for invite in ledger.invites()] == [True, False]


def test_revoking_voids_open_invitations_and_says_when_there_was_nothing(ledger: Ledger) -> None:
    ledger.add_invite(b"1" * 32, "hospital_a", 1.0, 100)

    assert ledger.revoke("hospital_a", 2.0)
    assert ledger.invites()[0].withdrawn
    assert not ledger.revoke("hospital_b", 2.0)


def test_a_token_withdrawn_a_moment_ago_lets_nobody_in(ledger: Ledger, member: Callable[[str], Member]) -> None:
    """Planted bug: `revoke` in another process, while a request under the token is looked at, shuts nobody out."""
    ledger.add_invite(b"t" * 32, "hospital_a", 1.0, 100)
    ledger.revoke("hospital_a", 2.0)

    assert not ledger.enrol(b"t" * 32, member("hospital_a"), 3.0)
    assert ledger.roster().members == ()


def test_another_processs_change_shows_in_the_version_and_ones_own_does_not(ledger: Ledger, state: Path) -> None:
    before = ledger.version
    ledger.set_fact("mine", b"1")
    own = ledger.version

    with Ledger(state / "fed.sqlite", "demo") as other:
        other.revoke("hospital_a", 1.0)

    assert own == before
    assert ledger.version != before


def test_a_transaction_that_breaks_off_leaves_no_row(ledger: Ledger, member: Callable[[str], Member]) -> None:
    ledger.enrol(b"t" * 32, member("hospital_a"), 1.0)
    ledger._db.execute("create trigger stop before insert on members begin select raise(abort, 'planted'); end")

    with pytest.raises(StorageError, match="ledger refused: planted"):
        ledger.enrol(b"u" * 32, member("hospital_b"), 2.0)

    assert ledger.roster().epoch == 1
    assert not ledger._db.in_transaction


def test_closing_an_exchange_marks_what_counted(ledger: Ledger) -> None:
    task = TaskManifest("demo", b"p" * 32, "train", 1, 1, ("hospital_a", "hospital_b"), 600)
    ledger.open_task(b"t" * 32, task.pack(), b"s" * 64, 1.0)
    for site in ("hospital_b", "hospital_a"):
        upload = UploadManifest(b"t" * 32, site, 1, (), BlobManifest((), b""))
        ledger.add_update(site.encode(), site, upload, b"s" * 64, 2.0)

    ledger.close_task(RecordClosed(b"t" * 32, "done", (b"hospital_a",), None, "why"), 3.0, notary().sign)

    row = ledger.tasks()[0]
    assert (row.manifest, row.outcome, row.reason, row.opened, row.closed) == (task, "done", "why", 1.0, 3.0)
    assert [(one.site, one.counted) for one in ledger.updates(b"t" * 32)] == [
        ("hospital_a", True),
        ("hospital_b", False),
    ]


def close_two(ledger: Ledger) -> None:
    for attempt in (1, 2):
        task = TaskManifest("demo", b"p" * 32, "train", 1, attempt, ("hospital_a", "hospital_b"), 600)
        name = hashlib.sha256(task.pack()).digest()
        ledger.open_task(name, task.pack(), b"s" * 64, 1.0)
        upload = UploadManifest(name, "hospital_b", 7, (), BlobManifest((), b""))
        ledger.add_update(bytes([attempt]) * 32, "hospital_b", upload, b"s" * 64, 2.0)
        outcome: Outcome = "done" if attempt == 2 else "abandoned"
        counted = (bytes([attempt]) * 32,) if attempt == 2 else ()
        ledger.close_task(RecordClosed(name, outcome, counted, None, "why"), 3.0, notary().sign)


def test_each_closed_exchange_adds_a_signed_record_to_the_chain(ledger: Ledger) -> None:
    close_two(ledger)

    rows = ledger._run("select number, packed, signature from records order by number")
    first, second = check_chain([Link(*row) for row in rows], "demo", FEDERATION_KEYS.public)
    assert (first.faults, second.faults) == ((), ())
    assert first.record is not None
    assert second.record is not None
    assert (first.record.outcome, first.record.counted, first.record.left_out[0].cases) == ("abandoned", (), 7)
    assert second.record.counted == (Weighed("hospital_b", b"\2" * 32, 7, 1.0, 2.0),)
    assert second.record.previous == first.record.id


def test_an_exchange_is_closed_with_its_record_or_not_at_all(ledger: Ledger) -> None:
    """Planted bug: the record written after the transaction."""
    task = TaskManifest("demo", b"p" * 32, "calibrate", 1, 1, ("hospital_a",), 600)
    ledger.open_task(b"t" * 32, task.pack(), b"s" * 64, 1.0)
    ledger._db.execute("create trigger stop before insert on records begin select raise(abort, 'planted'); end")

    with pytest.raises(StorageError, match="ledger refused: planted"):
        ledger.close_task(RecordClosed(b"t" * 32, "done", (), None), 3.0, notary().sign)

    assert ledger.tasks()[0].outcome is None


def test_every_key_that_a_site_ever_signed_with_is_remembered(ledger: Ledger, member: Callable[[str], Member]) -> None:
    """Planted bug: no trigger on a changed member."""
    first, second, third = (member("hospital_a") for _ in range(3))
    ledger.enrol(b"t" * 32, first, 1.0)
    ledger.enrol(b"u" * 32, second, 2.0)
    ledger._run("update members set signing_key=? where site='hospital_a'", third.signing_key)

    keys = {key for (key,) in ledger._run("select signing_key from site_keys where site='hospital_a'")}
    assert keys == {first.signing_key, second.signing_key, third.signing_key}


def test_a_ledger_of_another_version_is_refused_and_stays_as_it_is(ledger: Ledger) -> None:
    """Planted bug: the version checked after the tables are made."""
    ledger._db.execute("pragma user_version=1")
    ledger._db.execute("drop table records")

    with pytest.raises(StorageError, match="ledger has version 1, but this software reads version 2"):
        Ledger(ledger.path, "demo")

    assert ledger._db.execute("select count(*) from sqlite_schema where name='records'").fetchone() == (0,)


def test_a_ledger_of_another_federation_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match="belongs to federation demo, not to other"):
        Ledger(ledger.path, "other")


def test_a_file_that_is_no_ledger_is_refused_in_one_line(state: Path) -> None:
    (state / "fed.sqlite").write_text("this is not a database, but long enough to be one " * 40)

    with pytest.raises(
        StorageError, match=r"fed\.sqlite: ledger is damaged: file is not a database; fedoap-coordinator"
    ):
        Ledger(state / "fed.sqlite", "demo")


def test_a_ledger_locked_for_too_long_is_said(state: Path, ledger: Ledger) -> None:
    holder = sqlite3.connect(ledger.path, isolation_level=None)
    holder.execute("begin exclusive")
    ledger._db.execute("pragma busy_timeout=10")

    with pytest.raises(StorageError, match="ledger refused: database is locked"):
        ledger.revoke("hospital_a", 1.0)
    holder.close()


LOOKS: dict[str, Callable[[Ledger], object]] = {
    "facts": lambda ledger: ledger.fact("epoch"),
    "members": Ledger.roster,
    "invites": Ledger.invites,
    "tasks": Ledger.tasks,
    "updates": lambda ledger: ledger.updates(b"t" * 32),
    "parts": Ledger.parts,
    "published": lambda ledger: (ledger.kept(), ledger.published(b"b" * 32)),
}
"""Where the rows of each table are read."""


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("facts.value", ["text", 7]),
        ("members.site", [b"hospital_a"]),
        ("members.curve_key", ["text"]),
        ("invites.expires", ["soon"]),
        ("tasks.packed", [7, b"no manifest"]),
        ("tasks.opened", ["once"]),
        ("tasks.closed", [b"once"]),
        ("tasks.outcome", ["dome"]),
        ("tasks.result", [1.5]),
        ("updates.packed", ["text", b"no manifest"]),
        ("updates.stored", ["once"]),
        ("updates.upload", ["text"]),
        ("parts.signature", [7]),
        ("parts.at", [0, -1, 7, 1 << 40, "far"]),
        ("published.blob", ["text"]),
        ("published.manifest", [7, b"no manifest"]),
    ],
)
def test_a_cell_that_makes_no_sense_is_told_in_one_line(
    ledger: Ledger, make: Maker, column: str, cells: list[Cell]
) -> None:
    """Planted bugs: a traceback from wherever the row was parsed, or a value of another type handed on."""
    (table, name), look = column.split("."), LOOKS[column.partition(".")[0]]
    task, upload = make.task("init", 0), make.upload(b"t" * 32, "hospital_a", make.blob(size=300_000)[1])
    ledger.set_fact("epoch", b"1")
    ledger.add_invite(b"i" * 32, "hospital_a", 1.0, 9)
    ledger.enrol(b"i" * 32, Member("hospital_a", b"c" * 32, b"s" * 32), 1.0)
    ledger.open_task(b"t" * 32, task.pack(), b"s" * 64, 1.0)
    ledger.add_update(b"u" * 32, "hospital_a", upload, b"s" * 64, 1.0)
    ledger.record_part(b"u" * 32, "hospital_a", upload, b"s" * 64, upload.blob.chunk_bytes)
    ledger._run("insert into published values(?,?,null,1.0,1)", b"b" * 32, upload.blob.pack())
    look(ledger)

    for cell in cells:
        ledger._run(f"update {table} set {name}=?", cell)  # noqa: S608 - our own words
        with pytest.raises(StorageError, match=r"fed\.sqlite: ledger is damaged: .*; fedoap-coordinator verify says"):
            look(ledger)


def test_a_bug_of_our_own_is_not_called_damage(ledger: Ledger) -> None:
    """Planted bug: whatever TypeError or ValueError comes up while rows are read is laid to the disk."""
    with pytest.raises(TypeError), told(ledger.path):
        raise TypeError("a bug")


def test_a_damaged_page_is_told_wherever_it_is_met(tmp_path: Path) -> None:
    """Planted bug: a traceback, as SQLite meets the page while rows are read, after the statement was run."""
    path = tmp_path / "fed.sqlite"
    with Ledger(path, "demo") as ledger:
        for number in range(400):
            ledger._run("insert into published values(?,?,null,1.0,1)", number.to_bytes(32, "big"), b"made %d" % number)
    content = bytearray(path.read_bytes())
    last = content.rfind(b"made 399")
    page = last - last % 4096
    content[page : page + 4096] = b"\xff" * 4096
    path.write_bytes(content)

    with Ledger(path, "demo") as ledger, pytest.raises(StorageError, match="ledger is damaged: database disk image is"):
        ledger.kept()


def test_a_disk_that_is_full_when_the_ledger_is_opened_is_worth_another_start(tmp_path: Path) -> None:
    """Planted bug: `disk I/O error` and exit code 2, after which systemd leaves the coordinator down."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
    full, roomy = _usage(0), _usage(1 << 30)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: full)
        told = ledger_error(tmp_path / "fed.sqlite", error)
        patched.setattr("shutil.disk_usage", lambda _: roomy)
        other = ledger_error(tmp_path / "fed.sqlite", error)

    assert isinstance(told, DiskError)
    assert "the disk is full: make room" in str(told)
    assert not isinstance(other, DiskError)


def _usage(free: int) -> "shutil._ntuple_diskusage":
    return shutil._ntuple_diskusage(1 << 30, 0, free)
