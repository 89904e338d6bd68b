"""A server optimizer's moments on their way through the aggregation process, the store and retention."""

from contextlib import closing
from pathlib import Path

import numpy as np

from fedoap.config import FederationConfig
from fedoap.manifests import BlobManifest
from fedoap.protocol.events import Aggregated
from fedoap.tensors import read_blob, write_blob
from fedoap_coordinator.evidence import read_evidence
from fedoap_coordinator.folder import LEDGER
from fedoap_coordinator.merging import Merging
from fedoap_coordinator.store import Made, Store
from tests.coordinator.conftest import Maker
from tests.coordinator.test_merging import guarded, outcome, published, store, stored, task, value

__all__ = ["store"]


def kept(store: Store, model: BlobManifest) -> list[float]:
    """Return weight and moments of the first value, as the coordinator keeps them."""
    files = store.files(model, exact=True)
    manifest = BlobManifest.unpack(files.manifest.read_bytes())
    return [float(number) for number in np.asarray(read_blob(files.blob, manifest)["server.weight"])[0]]


def test_a_round_goes_on_from_the_moments_of_the_last_and_sites_get_weights_alone(
    state: Path, store: Store, make: Maker, config: FederationConfig
) -> None:
    """Delta 2.5: m = 2.5, x = 3.5; Delta 0: m = 1.25, x = 4.75. Planted bug: the published weights as next base."""
    base = published(store, make, 1.0)
    first = (stored(store, make, "hospital_a", 2.0), stored(store, make, "hospital_b", 5.0))
    second = (stored(store, make, "hospital_c", 3.5),)

    with closing(Merging(state, store, guarded(config, name="fedavgm", server_beta1=0.5))) as merging:
        merging.start(task(make, first, make.task("train", 1, base)))
        one = outcome(merging)
        assert isinstance(one, Aggregated)
        assert one.result
        merging.start(task(make, second, make.task("train", 2, one.result)))
        two = outcome(merging)

    assert isinstance(two, Aggregated)
    assert two.result
    assert (value(store, one.result), value(store, two.result)) == (3.5, 4.75)
    assert (kept(store, one.result), kept(store, two.result)) == ([3.5, 2.5], [4.75, 1.25])
    assert [spec.name for spec in two.result.tensors] == ["weight"]


def test_the_same_weights_with_other_moments_are_recorded_with_the_moments_that_are_there(
    state: Path, store: Store, make: Maker
) -> None:
    """Planted bug: the ledger keeps naming the first moments, so that `verify` finds the file broken."""
    for number in (1.0, 2.0):
        (path, model), master = make.blob(0.0), make.folder / f"master{number}"
        moments = write_blob(master, {"server.weight": np.full((3000, 2), number)})
        store.publish(Made(model, path, (master, moments)))

    (row,) = read_evidence(state / LEDGER).published

    assert row.exact == store.files(model, exact=True).manifest.read_bytes() == moments.pack()
