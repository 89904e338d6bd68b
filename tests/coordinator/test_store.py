"""The store: a crash between any two steps loses nothing that was acknowledged."""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest

from fedoap.config import RetentionConfig
from fedoap.errors import StorageError
from fedoap.manifests import BlobManifest, TaskManifest, UploadManifest
from fedoap.protocol.events import (
    DropPart,
    FinishPart,
    OpenPart,
    RecordClosed,
    RecordOpened,
    Stored,
    StoreFailed,
    WritePart,
)
from fedoap.seal import SealedFile, sealed_at
from fedoap.tensors import parse_blob, read_blob
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.store import Made, Store
from tests.coordinator.conftest import EXCHANGE, Maker, open_store

if TYPE_CHECKING:
    from _typeshed import TraceFunction


class Crashed(BaseException):
    """Stands for a power cut: nothing in the code may catch it."""


class Machine:
    """A coordinator's disk: opened, crashed, opened again."""

    def __init__(self, state: Path) -> None:
        self.state = state

    @contextmanager
    def opened(self, reserve_bytes: int = 0, **retention: int) -> Iterator[Store]:
        with Ledger(self.state / "fed.sqlite", "demo") as ledger:
            store = open_store(ledger, self.state, reserve_bytes, RetentionConfig(**retention))
            yield store
            store.blobs.close()

    def blobs(self) -> list[str]:
        return sorted(path.name for path in (self.state / "blobs").iterdir())

    def parts(self) -> list[str]:
        return sorted(path.name for path in (self.state / "parts").iterdir())


@pytest.fixture
def machine(state: Path) -> Machine:
    return Machine(state)


def open_task(store: Store, manifest: TaskManifest) -> bytes:
    task = hashlib.sha256(manifest.pack()).digest()
    store.apply(RecordOpened(task, manifest, manifest.pack(), b"s" * 64, EXCHANGE))
    return task


def upload(store: Store, make: Maker, task: bytes, site: str, value: float) -> Stored | StoreFailed | None:
    path, blob = make.blob(value)
    manifest = make.upload(task, site, blob)
    name = hashlib.sha256(manifest.pack()).digest()
    data = path.read_bytes()
    failed = store.apply(OpenPart(name, sealed_at(blob, blob.size)))
    for at, sealed in make.sealed(manifest, data):
        failed = failed or store.apply(WritePart(name, at, sealed))
    return failed or store.apply(FinishPart(name, blob, manifest, site, b"s" * 64))


def test_an_upload_is_stored_with_its_manifest_beside_it(machine: Machine, make: Maker) -> None:
    with machine.opened() as store:
        task = open_task(store, make.task("init", 0))

        answer = upload(store, make, task, "hospital_a", 2.0)

        history = store.history()
        assert isinstance(answer, Stored)
        assert history.open is not None
        (update,) = history.open.updates
        files = store.blobs.files(update.upload)
        assert UploadManifest.unpack(files.manifest.read_bytes()) == update.manifest
        plain = b"".join(SealedFile(files.blob, update.manifest, EXCHANGE).chunks())
        assert parse_blob(plain, update.manifest.blob)["weight"][0] == 2.0


def test_history_is_the_same_after_reopening(machine: Machine, make: Maker) -> None:
    with machine.opened() as store:
        run_rounds(store, make, rounds=2)
        open_task(store, make.task("train", 3, store.history().model))
        before = store.history()

    with machine.opened() as store:
        assert store.history() == before


def test_two_models_are_kept_and_all_updates_of_closed_rounds_are_gone(machine: Machine, make: Maker) -> None:
    with machine.opened() as store:
        models = run_rounds(store, make, rounds=4)

    kept = sorted(name for model in models[-2:] for name in (model.id.hex(), f"{model.id.hex()}.manifest"))
    assert machine.blobs() == kept


def test_what_the_open_task_needs_is_kept(machine: Machine, make: Maker) -> None:
    with machine.opened() as store:
        models = run_rounds(store, make, rounds=4)
        task = open_task(store, make.task("train", 5, models[-1]))
        upload(store, make, task, "hospital_a", 9.0)
        store.apply(DropPart(b"x" * 32))

    with machine.opened() as store:
        history = store.history()
        assert history.open is not None
        assert store.blobs.has(history.open.updates[0].upload)
        assert len(machine.blobs()) == 6


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a crash closes no file
@pytest.mark.parametrize("upload_rounds", [0, 1])
def test_a_crash_at_any_line_loses_nothing_acknowledged_and_the_round_can_be_ended(
    fast_folder: Path, upload_rounds: int
) -> None:
    """Planted bugs: the row before the rename; the deletion before the rows of what is kept no longer."""
    steps = 0
    while crash_after(steps, fast_folder / str(steps), upload_rounds):
        steps += 1

    assert steps > 50


def test_a_full_disk_is_refused_before_a_byte_is_accepted(machine: Machine, make: Maker) -> None:
    with machine.opened(reserve_bytes=1 << 60) as store:
        task = open_task(store, make.task("init", 0))

        answer = upload(store, make, task, "hospital_a", 1.0)

        assert isinstance(answer, StoreFailed)
        assert (answer.code, "disk is full" in answer.reason) == ("no_space", True)
        assert machine.parts() == []
        assert store.history().open is not None


def test_an_upload_larger_than_the_file_system_allows_is_refused(machine: Machine) -> None:
    with machine.opened() as store:
        answer = store.apply(OpenPart(b"u" * 32, 1 << 60))

        assert isinstance(answer, StoreFailed)
        assert answer.code == "no_space"
        assert machine.parts() == []


def test_an_upload_of_the_wrong_size_or_never_opened_is_corrupt(machine: Machine, make: Maker) -> None:
    with machine.opened() as store:
        task = open_task(store, make.task("init", 0))
        _, blob = make.blob()
        manifest = make.upload(task, "hospital_a", blob)
        store.apply(OpenPart(b"u" * 32, 5))

        short = store.apply(FinishPart(b"u" * 32, blob, manifest, "hospital_a", b"s" * 64))
        unknown = store.apply(WritePart(b"v" * 32, 0, b"x"))

        assert isinstance(short, StoreFailed)
        assert isinstance(unknown, StoreFailed)
        assert (short.code, unknown.code) == ("corrupt", "corrupt")
        assert machine.parts() == []


def test_an_upload_without_tensors_is_stored_too(machine: Machine, make: Maker) -> None:
    with machine.opened() as store:
        task = open_task(store, make.task("calibrate", 3))
        for site in ("hospital_a", "hospital_b"):
            manifest = make.upload(task, site, BlobManifest((), b""))
            name = hashlib.sha256(manifest.pack()).digest()
            store.apply(OpenPart(name, 0))

            assert store.apply(FinishPart(name, manifest.blob, manifest, site, b"s" * 64)) == Stored(name)


def test_a_failed_fsync_ends_the_daemon(machine: Machine, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with machine.opened() as store:
        task = open_task(store, make.task("init", 0))
        monkeypatch.setattr(os, "fdatasync", fail)

        with pytest.raises(StorageError, match="disk failed: Input/output error; what it holds is not known"):
            upload(store, make, task, "hospital_a", 1.0)


def test_a_needed_blob_that_is_missing_is_said_at_the_start(machine: Machine, make: Maker) -> None:
    with machine.opened() as store:
        (model, *_) = run_rounds(store, make, rounds=1)
        store.files(model).blob.unlink()

    with (
        pytest.raises(StorageError, match=f"{model.id.hex()}: blob is missing, but the ledger keeps it"),
        machine.opened(),
    ):
        pass


def test_parts_and_blobs_that_no_row_names_are_gone_at_the_next_start(machine: Machine) -> None:
    with machine.opened() as store:
        store.apply(OpenPart(b"u" * 32, 100))
    (machine.state / "blobs" / ("ab" * 32)).write_bytes(b"orphan")

    with machine.opened():
        assert machine.parts() == machine.blobs() == []


def test_reading_a_blob_that_is_gone_gives_nothing(machine: Machine) -> None:
    with machine.opened() as store:
        assert store.blobs.read(b"b" * 32, 0, 10) is None


def test_the_float32_original_lies_beside_a_rounded_model(machine: Machine, make: Maker) -> None:
    with machine.opened() as store:
        task = open_task(store, make.task("init", 0))
        (path, rounded), (exact_path, exact) = make.blob(1.0), make.blob(1.25)
        store.publish(Made(rounded, path, (exact_path, exact)))
        store.apply(RecordClosed(task, "done", (), rounded))

        original = store.files(rounded, exact=True)

        assert BlobManifest.unpack(original.manifest.read_bytes()) == exact
        assert read_blob(original.blob, exact)["weight"][0] == 1.25
        assert len(machine.blobs()) == 4


def run_rounds(store: Store, make: Maker, rounds: int) -> list[BlobManifest]:
    """Return the models of rounds 0 to `rounds`, each made from two uploads."""
    models: list[BlobManifest] = []
    for number in range(rounds + 1):
        manifest = make.task("train" if models else "init", number, models[-1] if models else None)
        models.append(run_exchange(store, make, manifest))
    return models


def run_exchange(store: Store, make: Maker, manifest: TaskManifest) -> BlobManifest:
    """Do what is left of an exchange and return its model."""
    history = store.history()
    task = history.open.task if history.open else open_task(store, manifest)
    opened = store.history().open
    assert opened is not None
    for value, site in enumerate(("hospital_a", "hospital_b")):
        if all(update.site != site for update in opened.updates):
            upload(store, make, task, site, 10.0 * manifest.round + value)
    path, model = make.blob(100.0 + manifest.round)
    store.publish(Made(model, path))
    after = store.history().open
    assert after is not None
    store.apply(RecordClosed(task, "done", tuple(update.upload for update in after.updates), model))
    return model


def crash_after(steps: int, folder: Path, upload_rounds: int) -> bool:
    """Crash the second exchange after so many lines, check what is left, end it; return whether it crashed at all."""
    (folder / "made").mkdir(parents=True)
    (folder / "state").mkdir()
    machine, make = Machine(folder / "state"), Maker(folder / "made")
    with machine.opened(upload_rounds=upload_rounds) as store:
        first = run_exchange(store, make, make.task("init", 0))
        manifest = make.task("train", 1, first)
        acknowledged, crashed = run_until(steps, store, make, manifest)
    with Ledger(machine.state / "fed.sqlite", "demo") as ledger:
        assert {blob.hex() for blob in ledger.kept()} <= set(machine.blobs())
    with machine.opened(upload_rounds=upload_rounds) as store:
        history = store.history()
        assert machine.parts() == []
        assert history.model is not None
        assert_acknowledged(store, acknowledged)
        if not history.closed[1:]:
            run_exchange(store, make, manifest)
        second = store.history().model
        assert second is not None
        assert read_blob(store.files(second).blob, second)["weight"][0] == 101.0
        last = store.ledger.updates(store.ledger.tasks()[-1].task) if upload_rounds else ()
        kept = {first.id.hex(), second.id.hex(), *(one.upload.hex() for one in last)}
        assert machine.blobs() == sorted([*kept, *(f"{name}.manifest" for name in kept)])
    shutil.rmtree(folder)
    return crashed


def run_until(steps: int, store: Store, make: Maker, manifest: TaskManifest) -> tuple[list[bytes], bool]:
    """Return the uploads that were acknowledged, and whether the crash came before the end."""
    acknowledged: list[bytes] = []
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
        task = open_task(store, manifest)
        for value, site in enumerate(("hospital_a", "hospital_b")):
            answer = upload(store, make, task, site, 10.0 + value)
            assert isinstance(answer, Stored)
            acknowledged.append(answer.upload)
        path, model = make.blob(101.0)
        store.publish(Made(model, path))
        store.apply(RecordClosed(task, "done", tuple(acknowledged), model))
    except Crashed:
        return acknowledged, True
    finally:
        sys.settrace(before)
    return acknowledged, False


def assert_acknowledged(store: Store, acknowledged: list[bytes]) -> None:
    history = store.history()
    if history.open is None:
        assert not acknowledged or history.closed[1:]
        return
    assert set(acknowledged) <= {update.upload for update in history.open.updates}
    for update in history.open.updates:
        files = store.blobs.files(update.upload)
        assert UploadManifest.unpack(files.manifest.read_bytes()) == update.manifest
        assert list(SealedFile(files.blob, update.manifest, EXCHANGE).chunks())
