"""The store after a power cut: each state that its folder may be left in, at each step of two exchanges."""

import hashlib
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedoap.errors import FedoapError, UpdateError
from fedoap.manifests import BlobManifest, TaskManifest
from fedoap.protocol.events import (
    FinishPart,
    OpenPart,
    RecordClosed,
    RecordOpened,
    Stored,
    StoreFailed,
    WritePart,
)
from fedoap.seal import SealedFile, public_half, sealed_at
from fedoap_coordinator.folder import LEDGER
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.store import Made, Store
from power import Recorder, cuts, lay_out
from tests.coordinator.conftest import EXCHANGE, Maker, open_store

SITES = ("hospital_a", "hospital_b")
SIZE = 1000
HALF = public_half(EXCHANGE)
Plant = Callable[[pytest.MonkeyPatch], None]


def test_no_power_cut_loses_what_was_acknowledged(fast_folder: Path) -> None:
    """Planted bugs: see below; and `blobs` made without a sync of the state folder, which this test found."""
    recorder = record(fast_folder, frozenset())

    states = replay_all(recorder, fast_folder)

    assert len(recorder.said) == 6
    assert states > 500
    sys.stdout.write(f"\npower cuts: {states} states of a folder at {len(recorder.moments)} steps: nothing lost\n")


@pytest.mark.parametrize(
    ("left_out", "found"),
    [
        ("fdatasync", "bytes of an acknowledged blob"),
        ("fsync", "manifest|key has 0 bytes"),
        ("fsync folder", "blob is missing, but the ledger keeps it|manifest is gone|key is missing"),
    ],
)
def test_a_store_that_leaves_out_a_sync_is_caught(fast_folder: Path, left_out: str, found: str) -> None:
    recorder = record(fast_folder, frozenset({left_out}))

    with pytest.raises((AssertionError, FedoapError), match=found):
        replay_all(recorder, fast_folder)


def test_a_store_that_writes_the_row_before_the_blob_is_caught(
    fast_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(self: Store, effect: FinishPart) -> Stored | StoreFailed:
        assert effect.upload is not None
        self.ledger.add_update(effect.part, effect.site, effect.upload, effect.signature, 1.0)
        trouble = self.blobs.finish_part(effect.part, effect.upload)
        return StoreFailed(effect.part, *trouble) if trouble else Stored(effect.part)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_finish", finish)
        recorder = record(fast_folder, frozenset())

    with pytest.raises(FedoapError, match="blob is missing, but the ledger keeps it"):
        replay_all(recorder, fast_folder)


def record(folder: Path, ignored: frozenset[str]) -> Recorder:
    """Return what a store did in two exchanges, looking on from before its first start."""
    state = folder / "state"
    (state / "merge").mkdir(parents=True)
    with Ledger(state / LEDGER, "demo") as ledger:
        recorder = Recorder(state, LEDGER, ignored)
        with recorder.recording():
            store = open_store(ledger, state)
            model = None
            for number, kind in enumerate(("init", "train")):
                manifest = TaskManifest("demo", b"p" * 32, kind, number, 1, SITES, 600, model, None, HALF)  # type: ignore[arg-type]
                model = exchange(store, Maker(state / "merge"), manifest, recorder)
            store.blobs.close()
    return recorder


def exchange(store: Store, make: Maker, manifest: TaskManifest, recorder: Recorder) -> BlobManifest:
    """Do one exchange, and take down what was acknowledged as soon as it may be."""
    task = hashlib.sha256(manifest.pack()).digest()
    store.apply(RecordOpened(task, manifest, manifest.pack(), b"s" * 64, EXCHANGE))
    recorder.look("task opened")
    for number, site in enumerate(SITES):
        recorder.said.append(upload(store, make, task, site, 10.0 * manifest.round + number))
        recorder.look("upload acknowledged")
    uploads = tuple(recorder.said[-2:])
    path, model = make.blob(100.0 + manifest.round, SIZE)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # the aggregation process does so; its folder's entry is nobody's promise
    os.close(descriptor)
    store.publish(Made(model, path))
    recorder.said.append(model.id)
    recorder.look("published")
    store.apply(RecordClosed(task, "done", uploads, model))
    recorder.look("task closed")
    return model


def upload(store: Store, make: Maker, task: bytes, site: str, value: float) -> bytes:
    path, blob = make.blob(value, SIZE)
    manifest = make.upload(task, site, blob)
    name, data = hashlib.sha256(manifest.pack()).digest(), path.read_bytes()
    path.unlink()
    store.apply(OpenPart(name, sealed_at(blob, blob.size)))
    for at, sealed in make.sealed(manifest, data):
        store.apply(WritePart(name, at, sealed))
    assert store.apply(FinishPart(name, blob, manifest, site, b"s" * 64)) == Stored(name)
    return name


def replay_all(recorder: Recorder, folder: Path) -> int:
    """Open a store on every state that a power cut may have left, and return how many there were."""
    count, rng = 0, random.Random(1)
    for moment in recorder.moments:
        for state in cuts(moment, rng):
            place = folder / "cut"
            lay_out(state, place)
            (place / LEDGER).write_bytes(moment.ledger)
            check(place, moment.said)
            shutil.rmtree(place)
            count += 1
    return count


def check(place: Path, said: tuple[bytes, ...]) -> None:
    """Open what is left: nothing acknowledged is gone or damaged, and an exchange can be done on it."""
    with Ledger(place / LEDGER, "demo") as ledger:
        store = open_store(ledger, place)
        history = store.history()
        recorded = {row.upload for task in ledger.tasks() for row in ledger.updates(task.task)}
        for update in history.open.updates if history.open else ():
            files = store.blobs.files(update.upload)
            assert files.manifest.exists(), "manifest is gone"
            assert files.manifest.read_bytes() == update.manifest.pack(), "manifest is damaged"
            try:
                list(SealedFile(files.blob, update.manifest, EXCHANGE).chunks())
            except UpdateError as error:
                raise AssertionError("bytes of an acknowledged blob are damaged") from error
        kept = [blob for blob in (history.model,) if blob is not None]
        for name in said:
            assert name in recorded or ledger.published(name), "an acknowledged row is gone"
        for blob in kept:
            files = store.files(blob)
            assert files.manifest.exists(), "manifest is gone"
            assert files.manifest.read_bytes() == blob.pack(), "manifest is damaged"
            raw = files.blob.read_bytes()
            assert hashlib.sha256(raw).digest() == blob.hashes, "bytes of an acknowledged blob are damaged"
        go_on(store, place / "made")
        store.blobs.close()


def go_on(store: Store, folder: Path) -> None:
    """Let a site that has not yet committed commit in the open exchange, or in the next one."""
    folder.mkdir()
    opened = store.history().open
    if opened is None:
        manifest = TaskManifest("demo", b"p" * 32, "train", 2, 1, SITES, 600, store.history().model, None, HALF)
        store.apply(
            RecordOpened(hashlib.sha256(manifest.pack()).digest(), manifest, manifest.pack(), b"s" * 64, EXCHANGE)
        )
        opened = store.history().open
    assert opened is not None
    for site in set(SITES) - {update.site for update in opened.updates}:
        upload(store, Maker(folder), opened.task, site, 7.0)
    again = store.history().open
    assert again is not None
    assert [update.site for update in again.updates] == list(SITES)
