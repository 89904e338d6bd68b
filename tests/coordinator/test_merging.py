"""The aggregation process: files in, durable files out, and the daemon goes on meanwhile."""

import hashlib
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from fedoap.config import FederationConfig, Plan, StrategyConfig
from fedoap.manifests import BlobManifest, Dtype, TaskManifest
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
from fedoap.tensors import read_blob, write_blob
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.merging import Merging
from fedoap_coordinator.store import Made, Store
from tests.coordinator.conftest import EXCHANGE, Maker, open_store


@pytest.fixture
def store(state: Path, ledger: Ledger) -> Iterator[Store]:
    store = open_store(ledger, state)
    yield store
    store.blobs.close()


@pytest.fixture
def merging(state: Path, store: Store, config: FederationConfig) -> Iterator[Merging]:
    merging = Merging(state, store, config.plan)
    yield merging
    merging.close()


def rounded(config: FederationConfig) -> Plan:
    return config.plan.model_copy(update={"wire": config.wire.model_copy(update={"dtype": "bfloat16"})})


def guarded(config: FederationConfig, **settings: str | float) -> Plan:
    return config.plan.model_copy(update={"strategy": StrategyConfig.model_validate(settings)})


def stored(store: Store, make: Maker, site: str, value: float, dtype: Dtype = "float32") -> Update:
    path = make.folder / f"{site}-{value}"
    blob = write_blob(path, {"weight": np.full(1000, value, np.float32)}, dtype)
    store.ledger.open_task(b"t" * 32, make.task("train", 1).pack(), b"s" * 64, 1.0)
    manifest = make.upload(b"t" * 32, site, blob)
    name = hashlib.sha256(manifest.pack()).digest()
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


def test_the_first_weights_are_taken_over_as_they_are(state: Path, store: Store, make: Maker, merging: Merging) -> None:
    first = stored(store, make, "hospital_a", 3.0)

    merging.start(task(make, (first,), make.task("init", 0)))
    end = outcome(merging)

    assert end == Aggregated(b"t" * 32, first.manifest.blob)
    assert value(store, first.manifest.blob) == 3.0
    assert list((state / "merge").iterdir()) == []


def test_the_mean_of_two_sites_is_a_durable_blob_that_sites_may_fetch(
    state: Path, store: Store, make: Maker, merging: Merging
) -> None:
    base = published(store, make, 1.0)
    updates = (stored(store, make, "hospital_a", 2.0), stored(store, make, "hospital_b", 5.0))

    merging.start(task(make, updates, make.task("train", 1, base)))
    end = outcome(merging)

    assert isinstance(end, Aggregated)
    assert value(store, end.result) == 3.5
    assert store.ledger.published(end.result.id if end.result else b"") == end.result


def test_with_bfloat16_the_float32_original_is_kept_and_is_the_next_rounds_base(
    state: Path, store: Store, make: Maker, config: FederationConfig, request: pytest.FixtureRequest
) -> None:
    base = published(store, make, 1.0, "bfloat16")
    updates = (
        stored(store, make, "hospital_a", 1.0, "bfloat16"),
        stored(store, make, "hospital_b", 1.0078125, "bfloat16"),
    )
    merging = Merging(state, store, rounded(config))
    request.addfinalizer(merging.close)

    merging.start(task(make, updates, make.task("train", 1, base)))
    end = outcome(merging)

    assert isinstance(end, Aggregated)
    assert end.result is not None
    assert end.result.tensors[0].dtype == "bfloat16"
    assert value(store, end.result) == 1.0
    assert value(store, end.result, exact=True) == 1.00390625


def test_the_first_weights_in_bfloat16_have_an_original_too(
    state: Path, store: Store, make: Maker, config: FederationConfig, request: pytest.FixtureRequest
) -> None:
    first = stored(store, make, "hospital_a", 3.0, "bfloat16")
    merging = Merging(state, store, rounded(config))
    request.addfinalizer(merging.close)

    merging.start(task(make, (first,), make.task("init", 0)))

    assert outcome(merging) == Aggregated(b"t" * 32, first.manifest.blob)
    assert value(store, first.manifest.blob, exact=True) == 3.0


def test_metrics_alone_need_no_process(state: Path, store: Store, make: Maker, merging: Merging) -> None:

    assert merging.start(task(make, (), make.task("calibrate", 3))) == Aggregated(b"t" * 32, None)
    assert not merging.busy


def test_updates_that_do_not_fit_fail_with_the_reason(state: Path, store: Store, make: Maker, merging: Merging) -> None:
    _, base = make.blob(1.0, size=7)
    files = store.files(base)
    files.blob.write_bytes(bytes(28))
    files.manifest.write_bytes(base.pack())

    merging.start(task(make, (stored(store, make, "hospital_a", 2.0),), make.task("train", 1, base)))
    end = outcome(merging)

    assert isinstance(end, AggregateFailed)
    assert "site hospital_a: names or shapes of its update are not those of the model" in end.reason
    assert end.site == "hospital_a"
    assert list((state / "merge").iterdir()) == []


def test_an_update_that_does_not_open_fails_and_its_site_is_named(store: Store, make: Maker, merging: Merging) -> None:
    good, bad = stored(store, make, "hospital_a", 2.0), stored(store, make, "hospital_b", 3.0)
    path = store.blobs.files(bad.upload).blob
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    merging.start(task(make, (good, bad), make.task("train", 1, published(store, make, 1.0))))
    end = outcome(merging)

    assert isinstance(end, AggregateFailed)
    assert "site hospital_b: its update on disk is damaged: chunk at byte 0 does not open" in end.reason
    assert end.site == "hospital_b"


def test_the_secret_is_neither_on_the_command_line_nor_in_the_job(store: Store, make: Maker, merging: Merging) -> None:
    """Planted bug: the secret as an argument."""
    merging.start(task(make, (stored(store, make, "hospital_a", 2.0),), make.task("init", 0)))

    running = merging._running
    assert running is not None
    shown = " ".join(map(str, running.process.args)) + (running.folder / "job.json").read_text()  # type: ignore[arg-type]
    assert not [form for form in (EXCHANGE.hex(), EXCHANGE.decode()) if form in shown]
    assert isinstance(outcome(merging), Aggregated)


@pytest.mark.parametrize("rule", ["mean", "trimmed_mean", "median"])
def test_a_site_that_sends_harm_moves_the_mean_alone(
    state: Path, store: Store, make: Maker, config: FederationConfig, rule: str
) -> None:
    """Three sites lie between 1 and 3, the fourth at -100. Planted bug: the process goes by the default strategy."""
    base = published(store, make, 1.0)
    values = {"hospital_a": 1.0, "hospital_b": 2.0, "hospital_c": 3.0, "hospital_d": -100.0}
    updates = tuple(stored(store, make, site, one) for site, one in values.items())

    with closing(Merging(state, store, guarded(config, rule=rule))) as merging:
        merging.start(task(make, updates, make.task("train", 1, base)))
        end = outcome(merging)

    assert isinstance(end, Aggregated)
    assert value(store, end.result) == (-23.5 if rule == "mean" else 1.5)


def test_a_site_beyond_the_norm_bound_is_named_with_figures_and_the_others_merge_without_it(
    state: Path, store: Store, make: Maker, config: FederationConfig
) -> None:
    """Planted bug: the bound is not looked at."""
    base = published(store, make, 1.0)
    values = {"hospital_a": 2.0, "hospital_b": -99.0, "hospital_c": 3.0}
    updates = tuple(stored(store, make, site, one) for site, one in values.items())

    with closing(Merging(state, store, guarded(config, max_norm_ratio=3.0))) as merging:
        merging.start(task(make, updates, make.task("train", 1, base)))
        refused = outcome(merging)
        merging.start(task(make, (updates[0], updates[2]), make.task("train", 1, base)))
        end = outcome(merging)

    assert refused == AggregateFailed(
        b"t" * 32,
        "site hospital_b: its update lies 3162 from the model, but at most 189.7 counts: "
        "strategy.max_norm_ratio = 3 times 63.25, the median of 3 sites",
        "hospital_b",
    )
    assert isinstance(end, Aggregated)
    assert value(store, end.result) == 2.5


def test_a_killed_process_is_a_failed_aggregation(state: Path, store: Store, make: Maker, merging: Merging) -> None:
    """Planted bug: what it wrote last, perhaps long ago and of no weight, is given as the reason."""
    merging.start(task(make, (stored(store, make, "hospital_a", 2.0),), make.task("init", 0)))
    running = merging._running
    assert running is not None
    merging._errors.write(b"RuntimeWarning: in an earlier job\n")
    merging._errors.flush()
    os.kill(running.process.pid, signal.SIGKILL)

    assert outcome(merging) == AggregateFailed(b"t" * 32, "the aggregation process was ended by signal 9 (Killed)")


def test_stopping_ends_the_process_and_leaves_nothing(state: Path, store: Store, make: Maker, merging: Merging) -> None:
    begun = time.monotonic()
    merging.start(task(make, (stored(store, make, "hospital_a", 2.0),), make.task("init", 0)))

    merging.stop()

    assert not merging.busy
    assert merging.poll() is None
    assert list((state / "merge").iterdir()) == []
    assert time.monotonic() - begun < 5.0


def test_one_process_merges_round_after_round(store: Store, make: Maker, merging: Merging) -> None:
    pids = set()
    for value_now in (2.0, 3.0):
        merging.start(task(make, (stored(store, make, f"hospital_{value_now}", value_now),), make.task("init", 0)))
        assert merging._process is not None
        pids.add(merging._process.pid)
        assert isinstance(outcome(merging), Aggregated)

    assert len(pids) == 1


def test_the_end_of_a_merge_wakes_who_waits_for_it(store: Store, make: Maker, merging: Merging) -> None:
    merging.start(task(make, (stored(store, make, "hospital_a", 2.0),), make.task("init", 0)))

    woken, _, _ = select.select(merging.descriptors(), [], [], 30.0)

    assert woken
    assert isinstance(merging.poll(), Aggregated)
    assert merging.descriptors() == []


def test_after_a_job_that_failed_comes_a_fresh_process(store: Store, make: Maker, merging: Merging) -> None:
    first = stored(store, make, "hospital_a", 2.0)
    merging.start(task(make, (first,), make.task("train", 1)))
    assert isinstance(outcome(merging), AggregateFailed)

    merging.start(task(make, (first,), make.task("init", 0)))

    assert isinstance(outcome(merging), Aggregated)


def test_the_process_ends_with_the_daemon(store: Store, make: Maker, merging: Merging) -> None:
    """Planted bug: a process that goes on reading after its input has ended."""
    merging.start(task(make, (stored(store, make, "hospital_a", 2.0),), make.task("init", 0)))
    outcome(merging)
    process = merging._process
    assert process is not None
    assert process.stdin is not None

    process.stdin.close()  # what the kernel does when the daemon is killed

    assert process.wait(30) == 0
