"""What the coordinator keeps of rounds that are over, as `[retention]` in fed.toml asks."""

from pathlib import Path

import pytest

from fedoap.errors import StorageError
from fedoap.protocol.events import RecordClosed
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.store import Made
from tests.coordinator.conftest import Maker
from tests.coordinator.test_store import Machine, open_task, run_rounds, upload


@pytest.fixture
def machine(state: Path) -> Machine:
    return Machine(state)


def kept_uploads(machine: Machine) -> list[int]:
    """Return the rounds whose uploads, both, are on the disk."""
    with Ledger(machine.state / "fed.sqlite", "demo") as ledger:
        files = set(machine.blobs())
        here = {
            row.manifest.round: {one.upload.hex() in files for one in ledger.updates(row.task)}
            for row in ledger.tasks()
        }
    return [number for number, all_here in here.items() if all_here == {True}]


def test_uploads_are_kept_for_as_many_models_as_asked_and_so_are_their_bases(machine: Machine, make: Maker) -> None:
    """Planted bug: bases not kept."""
    with machine.opened(upload_rounds=3) as store:
        models = run_rounds(store, make, rounds=5)

    assert kept_uploads(machine) == [3, 4, 5]
    assert {model.id.hex() for model in models[-4:]} <= set(machine.blobs())
    assert len(machine.blobs()) == 2 * (4 + 6)


def test_an_upload_that_did_not_count_is_not_kept(machine: Machine, make: Maker) -> None:
    """Planted bug: all uploads of a kept round kept."""
    with machine.opened(upload_rounds=1) as store:
        task = open_task(store, make.task("init", 0))
        for value, site in enumerate(("hospital_a", "hospital_b")):
            upload(store, make, task, site, value)
        first, second = store.ledger.updates(task)
        path, model = make.blob(5.0)
        store.publish(Made(model, path))
        store.apply(RecordClosed(task, "done", (first.upload,), model))

        assert [one.kept for one in store.ledger.updates(task)] == [True, False]
        assert not store.blobs.has(second.upload)


def test_a_later_wish_to_keep_more_does_not_ask_for_what_is_gone_and_one_for_less_is_done_at_once(
    machine: Machine, make: Maker
) -> None:
    """Planted bug: what is kept worked out from the configuration alone."""
    with machine.opened(upload_rounds=1) as store:
        run_rounds(store, make, rounds=3)

    with machine.opened(upload_rounds=9, results=9):
        assert kept_uploads(machine) == [3]
    with machine.opened():
        assert kept_uploads(machine) == []


def test_a_kept_upload_that_is_missing_is_said_at_the_start(machine: Machine, make: Maker) -> None:
    with machine.opened(upload_rounds=1) as store:
        run_rounds(store, make, rounds=1)
        (one, _) = store.ledger.updates(store.ledger.tasks()[-1].task)
        store.blobs.files(one.upload).blob.unlink()

    with (
        pytest.raises(StorageError, match=f"{one.upload.hex()}: blob is missing, but the ledger keeps it"),
        machine.opened(upload_rounds=1),
    ):
        pass
