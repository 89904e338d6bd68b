"""Patches of training, windows of the bank and of predictions: where they lie, and that nothing is lost between."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from fedoap.config import DataConfig
from fedoap.segmentation import augmentation
from fedoap.segmentation.augmentation import STRENGTHS, Places, Strength, augmented
from fedoap.segmentation.patches import covering, draw_patch, predict_by_windows
from fedoap.segmentation.streams import stream

CPU = torch.device("cpu")
SHAPES = [((12, 20), (8, 8)), ((12, 8, 9), (6, 4, 4))]
"""Of a case, and of patches whose length divides the case's along one axis and not along another."""
STILL = Strength(
    flips=((), ()), rotation_degrees=0, scale=1, shift=0, elastic=0,
    gamma=1, contrast=1, brightness=0, noise=0, speckle=0, blur=0.3,
)  # fmt: skip


def config(size: tuple[int, ...], patch: tuple[int, ...], *, share: float = 0.0, augment: bool = False) -> DataConfig:
    return DataConfig(size=size, patch=patch, lesion_share=share, augment=augment)


def numbered(size: tuple[int, ...]) -> Tensor:
    """An image (1, *S) whose voxels hold their own number."""
    return torch.arange(float(np.prod(size))).view(1, *size)


def marked(size: tuple[int, ...], *voxels: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(1, *size)
    for voxel in voxels:
        mask[(0, *voxel)] = 1
    return mask


def drawn(data: DataConfig, label: Tensor, count: int) -> Iterator[Tensor]:
    for index in range(count):
        yield draw_patch(numbered(data.size), label, data, stream(5, "patch", index)).image


@pytest.mark.parametrize(("size", "patch"), SHAPES)
def test_drawn_patches_reach_every_voxel(size: tuple[int, ...], patch: tuple[int, ...]) -> None:
    """Planted bug: the last place of a patch left out along each axis."""
    data = config(size, patch)

    found = list(drawn(data, marked(size), 300))

    assert {tuple(each.shape) for each in found} == {(1, *patch)}
    assert len(torch.unique(torch.cat(found))) == np.prod(size)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_lesions_share_of_patches_is_centred_on_one_of_its_voxels(share: float) -> None:
    """Planted bugs: the share's complement; the lesion's first voxel each time."""
    size, patch = (32, 32), (4, 4)
    voxels = ((9, 9), (21, 7), (14, 28))
    centre = 2 * 4 + 2  # of a patch, row by row

    found = Counter(
        int(each.flatten()[centre]) for each in drawn(config(size, patch, share=share), marked(size, *voxels), 2000)
    )

    counts = [found[32 * row + column] for row, column in voxels]
    assert sum(counts) / 2000 == pytest.approx(share, abs=0.03)  # and three voxels of 1024 by chance
    if share:
        assert min(counts) > 0.8 * 2000 * share / 3


def test_a_lesion_at_the_edge_is_in_the_patch_all_the_same() -> None:
    size, patch = (16, 12), (8, 8)
    label = marked(size, (15, 0))

    found = list(drawn(config(size, patch, share=1.0), label, 5))

    assert all((each == numbered(size)[0, 15, 0]).any() for each in found)


def test_a_case_without_lesion_is_seen_from_everywhere() -> None:
    size = (12, 12)

    found = list(drawn(config(size, (8, 8), share=1.0), marked(size), 200))

    assert len(torch.unique(torch.cat(found))) == 144


def test_a_patch_is_a_function_of_its_generator() -> None:
    data = config((12, 20), (8, 8), share=0.5)
    label = marked(data.size, (3, 4), (10, 17))

    ours, theirs = (list(drawn(data, label, 20)) for _ in range(2))

    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
    assert len({float(each[0, 0, 0]) for each in ours}) > 5


@pytest.mark.parametrize(("size", "patch"), SHAPES)
def test_image_and_mask_are_cut_alike_and_the_surroundings_stay_within_the_case(
    size: tuple[int, ...], patch: tuple[int, ...]
) -> None:
    """Planted bug: the patch's place counted from the case instead of from its surroundings."""
    data = config(size, patch, augment=True)
    image = numbered(size)

    for index in range(50):
        found = draw_patch(image, image.clone(), data, stream(1, "patch", index))
        inner = found.image[0][tuple(slice(at, at + n) for at, n in zip(found.start, patch, strict=True))]
        assert torch.equal(found.image, found.label)
        assert inner.shape == patch
        assert all(n <= around <= whole for n, around, whole in zip(patch, found.image.shape[1:], size, strict=True))


@pytest.mark.parametrize(("size", "patch"), SHAPES)
def test_augmentation_that_changes_nothing_returns_the_patch(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], patch: tuple[int, ...]
) -> None:
    """Planted bugs: half a voxel beside it; the first axis named first."""
    monkeypatch.setitem(augmentation.STRENGTHS, "mr", STILL)
    data = config(size, patch, augment=True)
    found = [draw_patch(numbered(size), numbered(size) % 2, data, stream(2, "patch", index)) for index in range(8)]
    images, labels = (torch.stack(side) for side in zip(*((each.image, each.label) for each in found), strict=True))

    places = Places(patch, tuple(each.start for each in found))
    moved, masks = augmented(images, labels, "mr", seed=0, step=0, items=range(8), places=places)

    for each, image, mask in zip(found, moved, masks, strict=True):
        inner = (slice(None), *(slice(at, at + n) for at, n in zip(each.start, patch, strict=True)))
        torch.testing.assert_close(image, each.image[inner], rtol=0, atol=0.4)  # the least blur changes borders by .3
        assert torch.equal(mask, each.label[inner])


def test_a_patch_that_turns_brings_in_what_is_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: the patch cut out before it is turned, which leaves dark corners."""
    turning = {name: getattr(STILL, name) for name in Strength.__dataclass_fields__} | {"rotation_degrees": 20}
    monkeypatch.setitem(STRENGTHS, "mr", Strength(**turning))
    data = config((64, 64), (16, 16), share=1.0, augment=True)
    slope = torch.arange(64.0).expand(1, 64, 64)
    found = draw_patch(slope, marked((64, 64), (32, 32)), data, stream(0, "patch"))

    images, labels, places = found.image[None], found.label[None], Places((16, 16), (found.start,))
    moved, _ = augmented(images, labels, "mr", seed=0, step=0, items=[0], places=places)

    bends = [moved.diff(n=2, dim=axis).abs().max() for axis in (2, 3)]
    assert max(bends) < 0.05  # a plane stays one; at a void it would fall off
    assert moved.diff(dim=2).abs().max() > 0.05


@pytest.mark.parametrize(("size", "patch"), SHAPES)
def test_the_banks_windows_cover_a_case(size: tuple[int, ...], patch: tuple[int, ...]) -> None:
    image = numbered(size)

    windows = [image[0][window] for window in covering(config(size, patch))]

    assert {tuple(each.shape) for each in windows} == {patch}
    assert len(torch.unique(torch.stack(windows))) == image.numel()
    assert len(windows) == np.prod([-(-whole // n) for whole, n in zip(size, patch, strict=True)])


def test_without_patch_the_only_window_is_the_case() -> None:
    (window,) = covering(DataConfig(size=(12, 8)))

    assert torch.equal(numbered((12, 8))[0][window], numbered((12, 8))[0])


@pytest.mark.parametrize(("size", "patch"), SHAPES)
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_a_network_that_answers_voxel_by_voxel_does_not_notice_windows(
    size: tuple[int, ...], patch: tuple[int, ...], overlap: float
) -> None:
    """Planted bug: the windows' probabilities blended where logits are promised."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    data = config(size, patch).model_copy(update={"overlap": overlap})
    seen: list[tuple[int, ...]] = []

    def voxel_by_voxel(part: Tensor) -> Tensor:
        seen.append(tuple(part.shape))
        return (part**2).sum(1, keepdim=True) - part[:, :1]

    logits = predict_by_windows(voxel_by_voxel, images, data, 3, CPU)

    torch.testing.assert_close(logits, voxel_by_voxel(images))
    assert {shape[2:] for shape in seen[:-1]} == {patch}
    assert max(shape[0] for shape in seen[:-1]) == 3


def test_the_middle_of_a_window_counts_more_than_its_border() -> None:
    """Where two windows disagree. Planted bug: equal weights, which give 0.5 in all of the overlap."""
    images = torch.arange(12.0).view(1, 1, 1, 12).expand(1, 1, 8, 12)

    def which(part: Tensor) -> Tensor:
        return (part >= 0) * (part[:, :, :1, :1] > 0).float()  # 0 of the window that starts at 0, 1 of the other

    row = predict_by_windows(which, images, config((8, 12), (8, 8)), 1, CPU)[0, 0, 4]

    assert row[:4].tolist() == [0.0] * 4
    assert row[8:].tolist() == [1.0] * 4
    assert 0 < row[4] < row[5] < 0.5 < row[6] < row[7] < 1
