"""The secrets that open uploads: there before the task is, gone with the uploads."""

import hashlib
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedoap.errors import IdentityError, StorageError
from fedoap.protocol.events import RecordClosed, RecordOpened
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.seals import Seals
from fedoap_coordinator.store import Store
from tests.coordinator.conftest import EXCHANGE, Maker, open_store


@pytest.fixture
def store(state: Path, ledger: Ledger) -> Iterator[Store]:
    store = open_store(ledger, state)
    yield store
    store.blobs.close()


def opened(store: Store, make: Maker) -> bytes:
    manifest = make.task("init", 0)
    task = hashlib.sha256(manifest.pack()).digest()
    store.apply(RecordOpened(task, manifest, manifest.pack(), b"s" * 64, EXCHANGE))
    return task


def again(state: Path, ledger: Ledger) -> Store:
    return open_store(ledger, state)


def test_the_secret_of_an_open_exchange_outlasts_a_restart_and_is_its_owners_alone(
    state: Path, ledger: Ledger, store: Store, make: Maker
) -> None:
    task = opened(store, make)

    history = again(state, ledger).history()

    assert history.open is not None
    assert history.open.secret == EXCHANGE
    assert stat.S_IMODE((state / "seals" / f"{task.hex()}.key").stat().st_mode) == 0o600
    assert EXCHANGE not in (state / "fed.sqlite").read_bytes() + (state / "fed.sqlite-wal").read_bytes()


def test_the_secret_is_durable_before_the_task_is_on_record(
    ledger: Ledger, store: Store, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: the row first."""
    order: list[str] = []
    monkeypatch.setattr(Seals, "add", lambda *_: order.append("secret"))
    monkeypatch.setattr(Ledger, "open_task", lambda *_: order.append("row"))

    opened(store, make)

    assert order == ["secret", "row"]


def test_the_secret_is_deleted_when_the_exchange_is_closed(state: Path, store: Store, make: Maker) -> None:
    task = opened(store, make)

    store.apply(RecordClosed(task, "abandoned", (), None))

    assert list((state / "seals").iterdir()) == []


def test_a_secret_that_a_crash_kept_from_deletion_is_gone_after_the_next_start(
    state: Path, ledger: Ledger, store: Store
) -> None:
    store.blobs.seals.add(b"x" * 32, EXCHANGE)

    again(state, ledger)

    assert list((state / "seals").iterdir()) == []


def test_an_open_exchange_without_its_secret_is_said_at_the_start(
    state: Path, ledger: Ledger, store: Store, make: Maker
) -> None:
    task = opened(store, make)
    (state / "seals" / f"{task.hex()}.key").unlink()

    with pytest.raises(StorageError, match=f"{task.hex()}.key: seal's key is missing, but the open exchange needs it"):
        again(state, ledger).history()


def test_a_secret_that_others_may_read_is_refused(state: Path, ledger: Ledger, store: Store, make: Maker) -> None:
    task = opened(store, make)
    (state / "seals" / f"{task.hex()}.key").chmod(0o644)

    with pytest.raises(IdentityError, match="chmod 600"):
        again(state, ledger).history()
