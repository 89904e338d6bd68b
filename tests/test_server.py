"""The server optimizers against arithmetic worked by hand, and merges that keep their moments."""

import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from fedoap.aggregation import merge_models, published
from fedoap.config import StrategyConfig
from fedoap.errors import TensorsError
from fedoap.manifests import BlobManifest, UploadManifest
from fedoap.server import Adaptive, Average, Momentum, Server, advance, first_moments
from fedoap.tensors import read_blob, write_blob

MOMENTUM = StrategyConfig(name="fedavgm", server_beta1=0.5)


def walk(server: Server, x: float, changes: list[float]) -> list[tuple[float, ...]]:
    """Return (x, m, v) after each round, if in round t the mean lies `changes[t]` from the weights."""
    weights = np.array([x])
    moments = np.array(first_moments(server))[:, None]
    found = []
    for change in changes:
        weights, moments = advance(server, weights, weights + change, moments)
        found.append((float(weights[0]), *(float(row[0]) for row in moments)))
    return found


def test_averaging_goes_a_share_of_the_way() -> None:
    assert walk(Average(0.5), 10.0, [4.0, 2.0]) == [(12.0,), (13.0,)]


def test_momentum_adds_up_changes_that_fade() -> None:
    """m = 4, then 4/2 + 2 = 4, then 4/2 - 2 = 0. Planted bug: (1 - beta1) Delta."""
    assert walk(Momentum(1.0, 0.5), 10.0, [4.0, 2.0, -2.0]) == [(14.0, 4.0), (18.0, 4.0), (18.0, 0.0)]


def test_adagrad_only_ever_shortens_its_steps() -> None:
    """v = 9 + 16 = 25, m = 2, step 4 * 2 / (5 + 3); then v = 25 + 144 = 169, m = 1 + 6 = 7, step 4 * 7 / (13 + 3)."""
    server = Adaptive("adagrad", eta=4.0, beta1=0.5, tau=3.0)

    assert walk(server, 10.0, [4.0, 12.0]) == [(11.0, 2.0, 25.0), (12.75, 7.0, 169.0)]


def test_adam_forgets_old_changes() -> None:
    """v = (1 + 49) / 2 = 25, m = 3.5, step 12 * 3.5 / (5 + 1). Planted bugs: tau inside the root; v from 0."""
    server = Adaptive("adam", eta=12.0, beta1=0.5, beta2=0.5, tau=1.0)

    assert walk(server, 10.0, [7.0]) == [(17.0, 3.5, 25.0)]


def test_yogi_moves_v_by_the_change_alone_down_and_up() -> None:
    """25 - 16 = 9, step 8 * 2 / (3 + 5); 9 < 16, so 9 + 16 = 25, m = 1 - 2 = -1. Planted bug: the sign turned round."""
    server = Adaptive("yogi", eta=8.0, beta1=0.5, beta2=0.0, tau=5.0)

    assert walk(server, 10.0, [4.0, -4.0]) == [(12.0, 2.0, 9.0), (11.2, -1.0, 25.0)]


def merged(
    folder: Path, base: tuple[Path, BlobManifest], updates: Mapping[str, float], strategy: StrategyConfig
) -> tuple[Path, BlobManifest]:
    """Return what the merge of sites whose weights are all one number leaves."""
    arrived = []
    for site, value in updates.items():
        tensors = {"a": np.full((2, 3), value, np.float32), "b": np.array(value, np.float32)}
        manifest = write_blob(folder / site, tensors)
        arrived.append((folder / site, UploadManifest(b"t" * 32, site, 1, (), manifest)))
    output = folder / f"merged{len(list(folder.iterdir()))}"
    return output, merge_models(arrived, base, strategy, output, slice_values=4)


def zeros(folder: Path) -> tuple[Path, BlobManifest]:
    return folder / "base", write_blob(folder / "base", {"a": np.zeros((2, 3)), "b": np.zeros(())})


def test_weights_and_moments_stand_side_by_side_and_the_next_round_goes_on_from_them(tmp_path: Path) -> None:
    """Delta 3: m = 3, x = 3; then Delta 4 - 3 = 1: m = 1.5 + 1, x = 5.5. Planted bug: moments start afresh."""
    first = merged(tmp_path, zeros(tmp_path), {"s": 2.0, "t": 4.0}, MOMENTUM)
    path, kept = merged(tmp_path, first, {"s": 4.0, "t": 4.0}, MOMENTUM)

    values = read_blob(path, kept)
    sent = published(path, kept, tmp_path / "sent", "float32")

    assert {spec.name: spec.shape for spec in kept.tensors} == {"server.a": (2, 3, 2), "server.b": (2,)}
    assert values["server.a"].reshape(-1, 2).tolist() == [[5.5, 2.5]] * 6
    assert {spec.name: spec.shape for spec in sent.tensors} == {"a": (2, 3), "b": ()}
    assert read_blob(tmp_path / "sent", sent)["a"].tolist() == [[5.5] * 3] * 2


def test_bits_of_weights_and_moments_do_not_depend_on_slices(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    blobs = [write_blob(tmp_path / f"u{i}", {"w": rng.normal(size=(9, 11))}) for i in range(3)]
    updates = [(tmp_path / f"u{i}", UploadManifest(b"t" * 32, f"s{i}", 1, (), blob)) for i, blob in enumerate(blobs)]
    base = tmp_path / "base", write_blob(tmp_path / "base", {"w": rng.normal(size=(9, 11))})
    adam = StrategyConfig(name="fedadam")

    ids = {
        merge_models(updates, base, adam, tmp_path / "out", slice_values=size).id for size in (1, 7, 98, 99, 1 << 19)
    }

    assert len(ids) == 1


def test_a_base_with_other_moments_is_refused(tmp_path: Path) -> None:
    first = merged(tmp_path, zeros(tmp_path), {"s": 2.0}, MOMENTUM)

    with pytest.raises(TensorsError, match="a has 1 moments, but the strategy's server optimizer has 2"):
        merged(tmp_path, first, {"s": 2.0}, StrategyConfig(name="fedadam"))
    with pytest.raises(TensorsError, match="a has 1 moments, but the strategy's server optimizer has 0"):
        merged(tmp_path, first, {"s": 2.0}, StrategyConfig(name="fedavg"))


def test_an_optimizer_needs_no_more_memory_for_a_larger_model(tmp_path: Path) -> None:
    """16 MB of weights, 48 MB with both moments. Planted bug: a whole tensor at once."""
    values = np.random.default_rng(2).normal(size=4 << 20).astype(np.float32)
    manifest = write_blob(tmp_path / "w", {"w": values})
    updates = [(tmp_path / "w", UploadManifest(b"t" * 32, f"s{i}", 1, (), manifest)) for i in range(3)]
    strategy = StrategyConfig(name="fedadam")
    kept = merge_models(updates, (tmp_path / "w", manifest), strategy, tmp_path / "kept")

    tracemalloc.start()
    again = merge_models(updates, (tmp_path / "kept", kept), strategy, tmp_path / "again")
    published(tmp_path / "again", again, tmp_path / "sent", "bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 32e6
