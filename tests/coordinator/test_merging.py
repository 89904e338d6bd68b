"""The aggregation process: files in, durable files out, and the daemon goes on meanwhile."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedoap.config import FederationConfig, Plan
from fedoap.protocol.events import (
    Aggregate,
    Aggregated,
    AggregateFailed,
    FinishPart,
    OpenPart,
    Update,
    WritePart,
)
from fedoap.seal import sealed_at
from fedoap.tensors import BlobManifest, Dtype, TaskManifest, read_blob, write_blob
from fedoap_coordinator.blobs import Blobs
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.merging import Merging
from fedoap_coordinator.store import Made, Store
from tests.coordinator.conftest import EXCHANGE, Maker


@pytest.fixture
def store(state: Path, ledger: Ledger) -> Iterator[Store]:
    store = Store(ledger, Blobs(state, 0), lambda: 1.0)
    yield store
    store.blobs.close()


def rounded(config: FederationConfig) -> Plan:
    return config.plan.model_copy(update={"wire": config.wire.model_copy(update={"dtype": "bfloat16"})})


def stored(store: Store, make: Maker, site: str, value: float, dtype: Dtype = "float32") -> Update:
    path = make.folder / f"{site}-{value}"
    blob = write_blob(path, {"weight": np.full(1000, value, np.float32)}, dtype)
    store.ledger.open_task(b"t" * 32, make.task("train", 1).pack(), b"s" * 64, 1.0)
    manifest = make.upload(b"t" * 32, site, blob)
    name = site.encode().ljust(32, b".")
    store.apply(OpenPart(name, sealed_at(blob, blob.size)))
    for at, sealed in make.sealed(manifest, path.read_bytes()):
        store.apply(WritePart(name, at, sealed))
    store.apply(FinishPart(name, blob, manifest, site, b"s" * 64))
    return Update(site, name, manifest)


def published(store: Store, make: Maker, value: float, dtype: Dtype = "float32") -> BlobManifest:
    """A model of the round before."""
    path = make.folder / f"base-{value}"
    blob = write_blob(path, {"weight": np.full(1000, value, np.float32)}, dtype)
    store.publish(Made(blob, path))
    return blob


def outcome(merging: Merging) -> Aggregated | AggregateFailed:
    until = time.monotonic() + 30.0
    while time.monotonic() < until:
        end = merging.poll()
        if end:
            return end
        time.sleep(0.01)
    pytest.fail("the aggregation process did not end")


def value(store: Store, manifest: BlobManifest | None, *, exact: bool = False) -> float:
    assert manifest is not None
    files = store.files(manifest, exact=exact)
    read = BlobManifest.unpack(files.manifest.read_bytes())
    return float(np.asarray(read_blob(files.blob, read)["weight"])[0])


def task(make: Maker, updates: tuple[Update, ...], manifest: TaskManifest) -> Aggregate:
    return Aggregate(b"t" * 32, manifest, updates, EXCHANGE)


def test_the_first_weights_are_taken_over_as_they_are(
    state: Path, store: Store, make: Maker, config: FederationConfig
) -> None:
    first = stored(store, make, "hospital_a", 3.0)
    merging = Merging(state, store, config.plan)

    merging.start(task(make, (first,), make.task("init", 0)))
    end = outcome(merging)

    assert end == Aggregated(b"t" * 32, first.manifest.blob)
    assert value(store, first.manifest.blob) == 3.0
    assert list((state / "merge").iterdir()) == []


def test_the_mean_of_two_sites_is_a_durable_blob_that_sites_may_fetch(
    state: Path, store: Store, make: Maker, config: FederationConfig
) -> None:
    base = published(store, make, 1.0)
    updates = (stored(store, make, "hospital_a", 2.0), stored(store, make, "hospital_b", 5.0))
    merging = Merging(state, store, config.plan)

    merging.start(task(make, updates, make.task("train", 1, base)))
    end = outcome(merging)

    assert isinstance(end, Aggregated)
    assert value(store, end.result) == 3.5
    assert store.ledger.published(end.result.id if end.result else b"") == end.result


def test_with_bfloat16_the_float32_original_is_kept_and_is_the_next_rounds_base(
    state: Path, store: Store, make: Maker, config: FederationConfig
) -> None:
    base = published(store, make, 1.0, "bfloat16")
    updates = (
        stored(store, make, "hospital_a", 1.0, "bfloat16"),
        stored(store, make, "hospital_b", 1.0078125, "bfloat16"),
    )
    merging = Merging(state, store, rounded(config))

    merging.start(task(make, updates, make.task("train", 1, base)))
    end = outcome(merging)

    assert isinstance(end, Aggregated)
    assert end.result is not None
    assert end.result.tensors[0].dtype == "bfloat16"
    assert value(store, end.result) == 1.0
    assert value(store, end.result, exact=True) == 1.00390625


def test_the_first_weights_in_bfloat16_have_an_original_too(
    state: Path, store: Store, make: Maker, config: FederationConfig
) -> None:
    first = stored(store, make, "hospital_a", 3.0, "bfloat16")
    merging = Merging(state, store, rounded(config))

    merging.start(task(make, (first,), make.task("init", 0)))

    assert outcome(merging) == Aggregated(b"t" * 32, first.manifest.blob)
    assert value(store, first.manifest.blob, exact=True) == 3.0


def test_metrics_alone_need_no_process(state: Path, store: Store, make: Maker, config: FederationConfig) -> None:
    merging = Merging(state, store, config.plan)

    assert merging.start(task(make, (), make.task("calibrate", 3))) == Aggregated(b"t" * 32, None)
    assert not merging.busy


def test_updates_that_do_not_fit_fail_with_the_reason(
    state: Path, store: Store, make: Maker, config: FederationConfig
) -> None:
    _, base = make.blob(1.0, size=7)
    merging = Merging(state, store, config.plan)
    files = store.files(base)
    files.blob.write_bytes(bytes(28))
    files.manifest.write_bytes(base.pack())

    merging.start(task(make, (stored(store, make, "hospital_a", 2.0),), make.task("train", 1, base)))
    end = outcome(merging)

    assert isinstance(end, AggregateFailed)
    assert "site hospital_a: names or shapes of its update are not those of the model" in end.reason
    assert end.site == "hospital_a"
    assert list((state / "merge").iterdir()) == []


def test_an_update_that_does_not_open_fails_and_its_site_is_named(
    state: Path, store: Store, make: Maker, config: FederationConfig
) -> None:
    good, bad = stored(store, make, "hospital_a", 2.0), stored(store, make, "hospital_b", 3.0)
    path = store.blobs.files(bad.upload).blob
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    merging = Merging(state, store, config.plan)

    merging.start(task(make, (good, bad), make.task("train", 1, published(store, make, 1.0))))
    end = outcome(merging)

    assert isinstance(end, AggregateFailed)
    assert "site hospital_b: its update on disk is damaged: chunk at byte 0 does not open" in end.reason
    assert end.site == "hospital_b"


def test_the_secret_is_neither_on_the_command_line_nor_in_the_job(
    state: Path, store: Store, make: Maker, config: FederationConfig
) -> None:
    """Planted bug: the secret as an argument."""
    merging = Merging(state, store, config.plan)

    merging.start(task(make, (stored(store, make, "hospital_a", 2.0),), make.task("init", 0)))

    running = merging._running
    assert running is not None
    shown = " ".join(map(str, running.process.args)) + (running.folder / "job.json").read_text()  # type: ignore[arg-type]
    assert not [form for form in (EXCHANGE.hex(), EXCHANGE.decode()) if form in shown]
    assert isinstance(outcome(merging), Aggregated)


def test_a_killed_process_is_a_failed_aggregation(
    state: Path, store: Store, make: Maker, config: FederationConfig
) -> None:
    merging = Merging(state, store, config.plan)
    merging.start(task(make, (stored(store, make, "hospital_a", 2.0),), make.task("init", 0)))
    running = merging._running
    assert running is not None
    os.kill(running.process.pid, signal.SIGKILL)

    assert outcome(merging) == AggregateFailed(b"t" * 32, "the aggregation process ended with code -9")


def test_stopping_ends_the_process_and_leaves_nothing(
    state: Path, store: Store, make: Maker, config: FederationConfig
) -> None:
    merging = Merging(state, store, config.plan)
    begun = time.monotonic()
    merging.start(task(make, (stored(store, make, "hospital_a", 2.0),), make.task("init", 0)))

    merging.stop()

    assert not merging.busy
    assert merging.poll() is None
    assert list((state / "merge").iterdir()) == []
    assert time.monotonic() - begun < 5.0
