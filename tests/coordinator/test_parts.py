"""Uploads under way: what is on record as durable is on the disk, and a restart goes on from there and nowhere else."""

import errno
import hashlib
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest

from fedoap.errors import StorageError
from fedoap.manifests import UploadManifest
from fedoap.protocol.events import (
    Arriving,
    DropPart,
    FinishPart,
    OpenPart,
    RecordClosed,
    RecordOpened,
    Stored,
    StoreFailed,
    SyncPart,
    WritePart,
)
from fedoap.seal import TAG_BYTES, sealed_at
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.rows import Cell
from fedoap_coordinator.store import Store, StoreEffect
from tests.coordinator.conftest import EXCHANGE, Maker, open_store

if TYPE_CHECKING:
    from _typeshed import TraceFunction

MIB = 1 << 20


@contextmanager
def opened(state: Path) -> Iterator[Store]:
    with Ledger(state / "fed.sqlite", "demo") as ledger:
        store = open_store(ledger, state)
        yield store
        store.blobs.close()


class Sent:
    """A site's upload of three chunks, the last one short, and the store's side of it."""

    def __init__(self, make: Maker) -> None:
        task = make.task("init", 0)
        self.task = hashlib.sha256(task.pack()).digest()
        self.opened = RecordOpened(self.task, task, task.pack(), b"s" * 64, EXCHANGE)
        path, self.blob = make.blob(2.0, size=(2 * MIB + 400) // 4)
        self.data = path.read_bytes()
        self.manifest: UploadManifest = make.upload(self.task, "hospital_a", self.blob)
        self.name = hashlib.sha256(self.manifest.pack()).digest()
        self.sealed = [data for _, data in make.sealed(self.manifest, self.data)]

    def open(self, at: int = 0) -> OpenPart:
        return OpenPart(self.name, sealed_at(self.blob, self.blob.size), at)

    def write(self, at: int) -> WritePart:
        return WritePart(self.name, sealed_at(self.blob, at), self.sealed[at // MIB])

    def sync(self, at: int) -> SyncPart:
        return SyncPart(self.name, at, self.manifest, "hospital_a", b"s" * 64)

    def finish(self) -> FinishPart:
        return FinishPart(self.name, self.blob, self.manifest, "hospital_a", b"s" * 64)

    def arriving(self, at: int) -> Arriving:
        return Arriving("hospital_a", self.name, self.manifest, b"s" * 64, at, self.data[:at][-7:])


@pytest.fixture
def sent(make: Maker) -> Sent:
    return Sent(make)


def under_way(store: Store) -> tuple[Arriving, ...]:
    history = store.history()
    return history.open.arriving if history.open else ()


def left_over(store: Store, state: Path, size: int) -> int:
    """Let the store delete a blob of this size, and return its inode."""
    path = state / "blobs" / ("0" * 64)
    path.write_bytes(b"x" * size)
    inode = path.stat().st_ino
    store.blobs.keep_only(frozenset())
    return inode


def test_an_upload_in_a_deleted_blobs_place_goes_on_as_any_other(state: Path, sent: Sent) -> None:
    """Planted bug: a part that is opened anew on top of a spare, and so emptied behind a recorded offset."""
    with opened(state) as store:
        inode = left_over(store, state, sent.open().size)
        for effect in (sent.opened, sent.open(), sent.write(0), sent.sync(MIB)):
            store.apply(effect)
        assert (state / "parts" / sent.name.hex()).stat().st_ino == inode

    with opened(state) as store:
        assert under_way(store) == (sent.arriving(MIB),)
        for effect in (sent.open(MIB), sent.write(MIB), sent.write(2 * MIB)):
            store.apply(effect)
        assert store.apply(sent.finish()) == Stored(sent.name)
        assert store.blobs.files(sent.name).blob.read_bytes() == b"".join(sent.sealed)


def test_spares_are_given_up_before_an_upload_is_refused(
    state: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: spares that outlast a full disk."""
    really = os.posix_fallocate

    def fallocate(descriptor: int, at: int, size: int) -> None:
        if list((state / "spares").iterdir()):
            raise OSError(errno.ENOSPC, "full")
        really(descriptor, at, size)

    with opened(state) as store:
        left_over(store, state, 100)
        store.apply(sent.opened)
        monkeypatch.setattr(os, "posix_fallocate", fallocate)

        assert store.apply(sent.open()) is None


def test_an_upload_goes_on_at_the_last_offset_on_record_and_is_whole_in_the_end(state: Path, sent: Sent) -> None:
    with opened(state) as store:
        for effect in (sent.opened, sent.open(), sent.write(0), sent.sync(MIB), sent.write(MIB)):
            store.apply(effect)

    with opened(state) as store:
        assert under_way(store) == (sent.arriving(MIB),)
        for effect in (sent.open(MIB), sent.write(MIB), sent.write(2 * MIB)):
            assert store.apply(effect) is None
        assert store.apply(sent.finish()) == Stored(sent.name)
        assert store.blobs.files(sent.name).blob.read_bytes() == b"".join(sent.sealed)

    with opened(state) as store:
        assert under_way(store) == ()
        assert store.ledger.parts() == ()


def test_nothing_goes_on_that_was_never_on_record(state: Path, sent: Sent) -> None:
    with opened(state) as store:
        for effect in (sent.opened, sent.open(), sent.write(0)):
            store.apply(effect)

    with opened(state) as store:
        assert under_way(store) == ()
        assert list((state / "parts").iterdir()) == []


@pytest.mark.parametrize("end", ["dropped", "begun anew", "exchange over", "file gone"])
def test_what_cannot_go_on_is_forgotten_with_its_part(state: Path, sent: Sent, end: str) -> None:
    """Planted bug: the row of a part that is begun anew left where it is."""
    with opened(state) as store:
        for effect in (sent.opened, sent.open(), sent.write(0), sent.sync(MIB)):
            store.apply(effect)
        match end:
            case "dropped":
                store.apply(DropPart(sent.name))
            case "begun anew":
                store.apply(sent.open())
            case "exchange over":
                store.apply(RecordClosed(sent.task, "abandoned", (), None))
            case _:
                (state / "parts" / sent.name.hex()).unlink()

    with opened(state) as store:
        assert under_way(store) == ()
        assert store.ledger.parts() == ()
        assert list((state / "parts").iterdir()) == []


def test_a_part_whose_last_chunk_on_record_does_not_open_is_let_go(state: Path, sent: Sent) -> None:
    with opened(state) as store:
        for effect in (sent.opened, sent.open(), sent.write(0), sent.sync(MIB)):
            store.apply(effect)
        store.apply(WritePart(sent.name, 100, b"\0"))

    with opened(state) as store:
        assert under_way(store) == ()
        assert list((state / "parts").iterdir()) == []


def test_a_part_that_is_gone_when_it_is_to_go_on_is_begun_anew(state: Path, sent: Sent) -> None:
    with opened(state) as store:
        for effect in (sent.opened, sent.open(), sent.write(0), sent.sync(MIB)):
            store.apply(effect)
    with opened(state) as store:
        (state / "parts" / sent.name.hex()).unlink()

        answer = store.apply(sent.open(MIB))

        assert isinstance(answer, StoreFailed)
        assert (answer.code, "is lost; offer it again" in answer.reason) == ("corrupt", True)
        assert store.apply(sent.open()) is None
        assert store.ledger.parts() == ()


def test_a_part_that_was_cut_short_is_gone_with_its_row_when_it_is_to_go_on(state: Path, sent: Sent) -> None:
    """Planted bug: part, row and an open descriptor stay until the site offers the upload again, if it ever does."""
    with opened(state) as store:
        for effect in (sent.opened, sent.open(), sent.write(0), sent.sync(MIB)):
            store.apply(effect)
    os.truncate(state / "parts" / sent.name.hex(), MIB + TAG_BYTES)
    with opened(state) as store:
        open_files = len(list(Path("/proc/self/fd").iterdir()))

        answer = store.apply(sent.open(MIB))

        assert isinstance(answer, StoreFailed)
        assert answer.code == "corrupt"
        assert len(list(Path("/proc/self/fd").iterdir())) == open_files
        assert store.ledger.parts() == ()
        assert list((state / "parts").iterdir()) == []


@pytest.mark.parametrize("folder", ["parts", "blobs", "seals", "spares"])
def test_a_folder_among_the_coordinators_files_is_told_in_words(state: Path, folder: str) -> None:
    """Planted bug: `the system refused: Is a directory`, and what to do about it is anybody's guess."""
    with opened(state):
        pass
    (state / folder / "copies").mkdir()

    with pytest.raises(StorageError, match=f"{folder}/copies: is a folder, .*: move it away"), opened(state):
        pass


def test_what_is_written_is_on_its_way_to_the_disk_long_before_it_is_synced(
    state: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: only at offsets that are multiples of the step, which sealed chunks never end at."""
    started: list[tuple[int, int]] = []
    monkeypatch.setattr("fedoap.tensors.WRITE_BACK_BYTES", MIB)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, at, size, __: started.append((at, size)))
    with opened(state) as store:
        for effect in (sent.opened, sent.open(), sent.write(0), sent.write(MIB), sent.write(2 * MIB)):
            store.apply(effect)

    assert started == [(0, MIB), (MIB, MIB)]


def test_an_offset_is_recorded_only_after_the_data_and_the_name_are_on_the_disk(
    state: Path, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bugs: no fdatasync; no sync of the folder; the row first."""
    order: list[str] = []
    real_data, real_run = os.fdatasync, Ledger._run

    def data(descriptor: int) -> None:
        order.append("data")
        real_data(descriptor)

    def name(folder: Path) -> None:
        order.append(folder.name)

    def run(self: Ledger, sql: str, *values: Cell) -> sqlite3.Cursor:
        order.append("row")
        return real_run(self, sql, *values)

    monkeypatch.setattr(os, "fdatasync", data)
    monkeypatch.setattr("fedoap_coordinator.blobs.sync_folder", name)
    monkeypatch.setattr(Ledger, "_run", run)
    with opened(state) as store:
        for effect in (sent.opened, sent.open(), sent.write(0)):
            store.apply(effect)
        order.clear()

        store.apply(sent.sync(MIB))

    assert order == ["data", "parts", "row"]


class Crashed(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a crash closes no file
def test_after_a_crash_at_any_line_every_offset_on_record_is_covered_by_the_right_bytes(
    tmp_path: Path, sent: Sent
) -> None:
    """Planted bug: a part emptied whose row stays."""
    ats, steps, ended = set[int](), 0, False
    while not ended:
        (state := tmp_path / str(steps)).mkdir()
        with opened(state) as store:
            store.apply(sent.opened)
            ended = not _crashes(steps, store, sent)
        with opened(state) as store:
            for one in under_way(store):
                ats.add(one.at)
                right = b"".join(sent.sealed[: one.at // MIB])
                assert (state / "parts" / one.upload.hex()).read_bytes()[: len(right)] == right
        steps += 3

    assert ats == {MIB, 2 * MIB}


def _crashes(steps: int, store: Store, sent: Sent) -> bool:
    left = steps

    def trace(frame: FrameType, event: str, argument: object) -> "TraceFunction | None":
        nonlocal left
        if "fedoap_coordinator" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Crashed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        once: list[StoreEffect] = [sent.open(), sent.write(0), sent.sync(MIB), sent.write(MIB), sent.sync(2 * MIB)]
        again: list[StoreEffect] = [
            sent.open(),
            sent.write(0),
            sent.sync(MIB),
            sent.write(MIB),
            sent.write(2 * MIB),
            sent.finish(),
        ]
        for effect in [*once, *again]:
            store.apply(effect)
    except Crashed:
        return True
    finally:
        sys.settrace(before)
    return False
