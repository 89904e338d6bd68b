from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from fedoap.bank import SPLIT_OFFSET, choose_seeds, merge_bank
from fedoap.config import BankConfig, DataConfig, NetworkConfig, Plan
from fedoap.errors import TensorsError
from fedoap.manifests import BlobManifest, UploadManifest
from fedoap.tensors import read_blob, write_blob

CHANNELS = 8


def plan(slots: int = 2, heads: int = 2, seed: int = 5, mass: float = 64.0) -> Plan:
    return Plan(
        federation="f",
        seed=seed,
        network=NetworkConfig(width=4, depth=1, heads=heads),
        bank=BankConfig(slots=slots, min_patients=3, mass=mass),
        data=DataConfig(size=(8, 8)),
    )


def update(
    folder: Path, site: str, counts: ArrayLike, keys: ArrayLike, *, patients: ArrayLike | None = None
) -> tuple[Path, UploadManifest]:
    """Sums of a site whose values are ten times its keys."""
    n = np.asarray(counts, np.int64)
    k = np.asarray(keys, np.float32)
    p = np.where(n > 0, 3, 0) if patients is None else np.asarray(patients)
    tensors: dict[str, NDArray[np.generic]] = {"counts": n, "patients": p.astype(np.int64), "keys": k, "values": 10 * k}
    manifest = write_blob(folder / site, tensors)
    return folder / site, UploadManifest(b"t" * 32, site, 1, (), manifest)


def at(*positions: float) -> NDArray[np.float32]:
    """Keys that differ in the first channel only."""
    keys = np.zeros((len(positions), CHANNELS), np.float32)
    keys[:, 0] = positions
    return keys


def first_channel(path: Path, manifest: BlobManifest, name: str) -> list[float]:
    values = read_blob(path, manifest)[name]
    return [float(x) for x in values[0, :, 0]]


def test_sums_and_counts_are_added_and_divided(tmp_path: Path) -> None:
    updates = [update(tmp_path, "b", [4, 1], at(8.0, 3.0)), update(tmp_path, "a", [2, 1], at(1.0, 5.0))]

    manifest = merge_bank("bank", updates, None, plan(mass=16.0), tmp_path / "out")

    bank = read_blob(tmp_path / "out", manifest)
    assert bank["counts"].tolist() == [6, 2]
    assert first_channel(tmp_path / "out", manifest, "keys") == [1.5, 4.0]
    assert first_channel(tmp_path / "out", manifest, "values") == [15.0, 40.0]
    assert bank["log_weights"].tolist() == pytest.approx([np.log(6 / 8 * 16), np.log(2 / 8 * 16)])


def test_heads_lie_side_by_side_in_the_sums_and_apart_in_the_bank(tmp_path: Path) -> None:
    """Planted bug: rows reshaped to (H, M, D) without moving the heads' axis."""
    keys = np.arange(2 * CHANNELS, dtype=np.float32).reshape(2, CHANNELS)

    manifest = merge_bank("bank", [update(tmp_path, "a", [1, 1], keys)], None, plan(heads=2), tmp_path / "out")

    bank = read_blob(tmp_path / "out", manifest)
    assert bank["keys"].shape == (2, 2, 4)
    assert bank["keys"][1, 0].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert bank["keys"][0, 1].tolist() == [8.0, 9.0, 10.0, 11.0]


def test_seeding_joins_the_sites_clusters_that_lie_together(tmp_path: Path) -> None:
    updates = [
        update(tmp_path, "a", [4, 2], at(4 * 0.0, 2 * 100.0)),
        update(tmp_path, "b", [6, 6], at(6 * 101.0, 6 * 1.0)),
    ]

    manifest = merge_bank("seed", updates, None, plan(slots=2), tmp_path / "out")

    bank = read_blob(tmp_path / "out", manifest)
    found = dict(zip(bank["counts"].tolist(), first_channel(tmp_path / "out", manifest, "keys"), strict=True))
    assert found == {10: pytest.approx(0.6), 8: pytest.approx(806 / 8)}


def test_the_same_sums_give_the_same_bank_in_any_order_and_another_seed_another(tmp_path: Path) -> None:
    """Planted bugs: a generator seeded by the operating system; sites taken as they come."""
    rng = np.random.default_rng(3)
    updates = [update(tmp_path, site, [5] * 6, rng.normal(size=(6, CHANNELS))) for site in "abcd"]

    same = {merge_bank("seed", some, None, plan(6), tmp_path / "out").id for some in (updates, updates[::-1])}
    other = merge_bank("seed", updates, None, plan(6, seed=6), tmp_path / "out").id

    assert len(same) == 1
    assert other not in same


def test_seeds_are_drawn_by_weight_and_distance() -> None:
    points = np.array([[0.0], [0.1], [50.0], [50.1]])
    firsts, pairs = [], []

    for seed in range(400):
        seeds = choose_seeds(points, np.array([97, 1, 1, 1]), 2, np.random.default_rng(seed))
        firsts.append(seeds[0, 0])
        pairs.append(abs(seeds[0, 0] - seeds[1, 0]))

    assert np.mean(np.array(firsts) == 0.0) == pytest.approx(0.97, abs=0.03)
    assert np.mean(np.array(pairs) > 40) > 0.99


def test_fewer_clusters_than_slots_leave_silent_slots_beside_the_heaviest(tmp_path: Path) -> None:
    update_a = update(tmp_path, "a", [30, 10], at(30 * 2.0, 10 * 8.0))

    manifest = merge_bank("seed", [update_a], None, plan(slots=5), tmp_path / "out")

    bank = read_blob(tmp_path / "out", manifest)
    keys = bank["keys"].transpose(1, 0, 2).reshape(5, -1)
    assert sorted(bank["counts"].tolist()) == [0, 0, 0, 10, 30]
    assert bank["log_weights"][bank["counts"] == 0].tolist() == [-np.inf] * 3
    heaviest = keys[bank["counts"] == 30]
    distances = np.linalg.norm(keys[bank["counts"] == 0] - heaviest, axis=1)
    assert distances[:2] == pytest.approx([SPLIT_OFFSET * 2.0] * 2, rel=1e-4)


def test_dead_slots_are_spread_by_the_tokens_left_for_each_part(tmp_path: Path) -> None:
    """30, 15, 10 for three parts against 14. Planted bug: every dead slot splits the one heaviest."""
    sums = update(tmp_path, "a", [30, 0, 14, 0, 0], at(30.0, 0.0, 14 * 9.0, 0.0, 0.0))

    manifest = merge_bank("bank", [sums], None, plan(slots=5), tmp_path / "out")

    keys = first_channel(tmp_path / "out", manifest, "keys")
    assert [round(key) for key in keys] == [1, 1, 9, 1, 9]


def test_a_bank_without_any_contribution_is_silent_and_keeps_its_keys(tmp_path: Path) -> None:
    first = merge_bank("bank", [update(tmp_path, "a", [1, 1], at(3.0, 4.0))], None, plan(), tmp_path / "one")
    nothing = update(tmp_path, "b", [0, 0], at(0.0, 0.0))

    second = merge_bank("bank", [nothing], (tmp_path / "one", first), plan(), tmp_path / "two")
    seeded = merge_bank("seed", [nothing], None, plan(), tmp_path / "three")

    assert first_channel(tmp_path / "two", second, "keys") == [3.0, 4.0]
    assert read_blob(tmp_path / "two", second)["log_weights"].tolist() == [-np.inf, -np.inf]
    assert first_channel(tmp_path / "three", seeded, "keys") == [0.0, 0.0]


def test_sums_that_cannot_be_used_are_refused_by_site_and_slot(tmp_path: Path) -> None:
    """Planted bug: a count of 2^63 - 1 is added to another's, and the bank's log weights are not numbers."""
    good = update(tmp_path, "good", [1, 1], at(1.0, 1.0))
    odd = {
        "site few: slot 1 .*min_patients = 3": update(tmp_path, "few", [9, 9], at(1.0, 1.0), patients=[3, 2]),
        "site minus: slot 0 .* negative": update(tmp_path, "minus", [-1, 1], at(1.0, 1.0)),
        "site nan: slot 1 .* not finite": update(tmp_path, "nan", [1, 1], at(1.0, np.nan)),
        "site huge: slot 1 .* reaches 1e": update(tmp_path, "huge", [1, 1], at(1.0, 2e29)),
        "site many: slot 0 .* tokens": update(tmp_path, "many", [2**63 - 1, 1], at(1.0, 1.0)),
        "site ghost: slot 0 .* count is 0": update(tmp_path, "ghost", [0, 1], at(1.0, 1.0)),
        "site long: its sums are for 3 slots": update(tmp_path, "long", [1, 1, 1], at(1.0, 1.0, 1.0)),
        "site short: its sums are for 1 slots": update(tmp_path, "short", [1], at(1.0)),
        "site narrow: its bank sums": update(tmp_path, "narrow", [1, 1], np.ones((2, CHANNELS - 1))),
    }

    for message, bad in odd.items():
        with pytest.raises(TensorsError, match=message):
            merge_bank("bank", [good, bad], None, plan(), tmp_path / "out")
    with pytest.raises(TensorsError, match="no update"):
        merge_bank("bank", [], None, plan(), tmp_path / "out")


def test_an_upload_with_other_tensors_is_refused(tmp_path: Path) -> None:
    for site, tensors in {"none": {}, "scalar": {"counts": np.int64(3)}}.items():
        manifest = write_blob(tmp_path / site, {name: np.asarray(value) for name, value in tensors.items()})
        upload = UploadManifest(b"t" * 32, site, 1, (), manifest)

        with pytest.raises(TensorsError, match=f"site {site}: its bank sums"):
            merge_bank("seed", [(tmp_path / site, upload)], None, plan(), tmp_path / "out")


def test_counts_that_no_site_can_have_are_refused(tmp_path: Path) -> None:
    """Two sites' 2**62 tokens add up to -2**63. Planted bug: no bound, by which log weights are not numbers."""
    updates = [update(tmp_path, site, [2**62, 1], at(1.0, 1.0)) for site in "ab"]

    with pytest.raises(TensorsError, match=r"site a: slot 0 of its bank sums counts more than 1099511627776 tokens"):
        merge_bank("bank", updates, None, plan(), tmp_path / "out")
