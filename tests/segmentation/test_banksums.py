import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedoap.config import BankConfig, DataConfig, NetworkConfig, Plan, SiteData, TrainingConfig
from fedoap.segmentation import banksums
from fedoap.segmentation.banksums import TokenSource, bank_sums, seed_sums
from fedoap.segmentation.datalist import load_datalist

CPU = torch.device("cpu")


class Halves:
    """Two tokens an image, how much of its upper and its lower half is bright; values are ten times the keys."""

    def tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        bright = (image > image.mean()).float().view(len(image), 2, -1).mean(2, keepdim=True)
        keys = bright.round() * torch.tensor([1.0, 0.0, 0.0, 0.0])
        return keys, 10 * keys


class Voxels:
    """One token a voxel of any image: its position's number in the case, which is its brightness."""

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()

    def tokens(self, image: Tensor) -> tuple[Tensor, Tensor]:
        self.shapes.add(tuple(image.shape[2:]))
        keys = image.flatten(2).mT.expand(-1, -1, 4)
        return keys, keys


def plan(slots: int = 2, min_patients: int = 1, cases: int = 256, batch: int = 2) -> Plan:
    return Plan(
        federation="f",
        network=NetworkConfig(width=4, depth=1),
        bank=BankConfig(slots=slots, min_patients=min_patients, cases_per_site=cases),
        data=DataConfig(size=(8, 8)),
        training=TrainingConfig(batch_size=batch),
    )


def source(folder: Path, patients: str, settings: Plan) -> TokenSource:
    """One image for each letter, of the patient of that name; upper half black, lower half white."""
    rows = []
    mask = np.repeat(np.array([0, 255], np.uint8), 32).reshape(8, 8)
    for index, patient in enumerate(patients):
        Image.fromarray(np.where(mask, 200, np.arange(8)).astype(np.uint8)).save(folder / f"{index}.png")
        Image.fromarray(mask).save(folder / f"{index}m.png")
        rows.append({"image": f"{index}.png", "label": f"{index}m.png", "patient": patient})
    (folder / "list.json").write_text(json.dumps({"training": rows}))
    data = SiteData(datalist=folder / "list.json", modality="photo", window=(0, 255))
    return TokenSource(Halves(), load_datalist(data, "training"), data, settings, None, CPU)


CENTROIDS = torch.tensor([[0.9, 0, 0, 0], [0.2, 0, 0, 0]])


def test_each_token_adds_to_its_nearest_slot(tmp_path: Path) -> None:
    sums = bank_sums(source(tmp_path, "abc", plan()), CENTROIDS)

    assert sums["counts"].tolist() == [3, 3]
    assert sums["patients"].tolist() == [3, 3]
    assert sums["keys"][:, 0].tolist() == [3.0, 0.0]
    assert sums["values"][:, 0].tolist() == [30.0, 0.0]
    assert sums["keys"].dtype == np.float32


def test_a_slot_of_too_few_patients_stays_at_the_site(tmp_path: Path) -> None:
    """Four images of two patients. Planted bug: cases counted instead of patients."""
    few = bank_sums(source(tmp_path, "aabb", plan(min_patients=3)), CENTROIDS)
    enough = bank_sums(source(tmp_path, "aabc", plan(min_patients=3)), CENTROIDS)

    assert not any(values.any() for values in few.values())
    assert enough["counts"].tolist() == [4, 4]
    assert enough["patients"].tolist() == [3, 3]


def test_a_slot_that_no_token_is_near_to_stays_empty(tmp_path: Path) -> None:
    centroids = torch.cat([CENTROIDS, torch.full((1, 4), 100.0)])

    sums = bank_sums(source(tmp_path, "abc", plan(slots=3)), centroids)

    assert sums["counts"].tolist() == [3, 3, 0]
    assert sums["keys"][2].tolist() == [0.0] * 4


def test_seeding_finds_the_clusters(tmp_path: Path) -> None:
    sums = seed_sums(source(tmp_path, "abcd", plan()), seed=1)

    assert sums["counts"].tolist() == [4, 4]
    assert sorted(sums["keys"][:, 0].tolist()) == [0.0, 4.0]


def test_there_are_no_more_slots_than_cases_and_than_distinct_tokens(tmp_path: Path) -> None:
    one = seed_sums(source(tmp_path, "a", plan(slots=7)), seed=1)
    four = seed_sums(source(tmp_path, "abcd", plan(slots=7)), seed=1)

    assert one["counts"].tolist() == [2]
    assert four["counts"].tolist() == [4, 4]


def test_the_cases_of_an_exchange_are_spread_over_the_list(tmp_path: Path) -> None:
    chosen = source(tmp_path, "abcdefgh", plan(cases=4)).chosen()

    assert [case.patient for case in chosen] == ["a", "c", "e", "g"]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_sums_do_not_depend_on_the_batches(tmp_path: Path, batch: int) -> None:
    """Planted bug: a batch that is not full left out."""
    sums = seed_sums(source(tmp_path, "abcdefg", plan(batch=batch)), seed=1)

    assert sums["counts"].tolist() == [7, 7]


def test_patches_bring_all_tokens_of_a_case(tmp_path: Path) -> None:
    """Three windows of 8 x 4 in 8 x 12, each case counted once a slot. Planted bug: the first window's tokens alone."""
    network, whole = Voxels(), plan()
    parted = whole.model_copy(update={"data": DataConfig(size=(8, 12), patch=(8, 4))})
    cases = replace(source(tmp_path, "aab", parted), network=network)

    ours = bank_sums(cases, CENTROIDS)
    whole = whole.model_copy(update={"data": DataConfig(size=(8, 12))})
    theirs = bank_sums(replace(cases, plan=whole), CENTROIDS)

    assert network.shapes == {(8, 4), (8, 12)}
    assert ours["counts"].sum() == 3 * 96
    assert {name: values.tolist() for name, values in ours.items()} == {
        name: pytest.approx(values, rel=1e-6) for name, values in theirs.items()
    }


def test_the_same_seed_gives_the_same_clusters() -> None:
    points = torch.randn(500, 6, generator=torch.Generator().manual_seed(4))

    same = [banksums._cluster(points, 9, seed=2) for _ in range(2)]

    assert torch.equal(*same)
    assert not torch.equal(same[0], banksums._cluster(points, 9, seed=3))


def test_clusters_leave_less_than_half_of_the_spread() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(5))
    points = centres.repeat_interleave(100, 0) + noise

    found = banksums._cluster(points, 3, seed=1)

    distances = torch.cdist(centres, found)
    assert distances.amin(1).max() < 0.5
