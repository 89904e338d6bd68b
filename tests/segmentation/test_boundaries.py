"""Calibration's losses, against sums worked out by hand on a row of seven voxels."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from fedoap.config import CalibrationConfig
from fedoap.kernels import perturbed_boundary_loss
from fedoap.segmentation.boundaries import boundary_loss, calibration_loss, hausdorff_dt_loss, signed_distance
from fedoap.segmentation.objectives import SMOOTH, segmentation_loss

Y = [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
P = [0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.1]
PHI = [2.0, 1.0, 0.0, -1.0, 0.0, 1.0, 2.0]


def row(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, 1, 1, 7)


def logits_of(probabilities: list[float]) -> Tensor:
    return row([math.log(p / (1 - p)) for p in probabilities])


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


def noise(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 8, 8, generator=generator), (torch.rand(2, 1, 8, 8, generator=generator) > 0.7).float()


def test_the_signed_distance_is_0_at_the_border_and_below_0_inside() -> None:
    """Planted bugs: 1 at the border inside; no sign."""
    assert signed_distance(row(Y)).tolist() == row(PHI).tolist()


def test_distances_are_euclidean_in_every_dimension() -> None:
    corner = torch.zeros(1, 1, 3, 4, 5)
    corner[..., 0, 0, 0] = 1

    assert signed_distance(corner)[0, 0, 2, 3, 4] == pytest.approx(math.sqrt(4 + 9 + 16))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mask_without_border_has_no_distances(value: float) -> None:
    assert not signed_distance(torch.full((1, 1, 4, 4), value)).any()


def test_each_mask_of_a_batch_has_distances_of_its_own() -> None:
    """Planted bug: the first mask's for all."""
    masks = torch.cat([row(Y), row(Y).roll(1, -1)])

    assert signed_distance(masks)[1].flatten().tolist() == [3.0, 2.0, 1.0, 0.0, -1.0, 0.0, 1.0]


def test_the_boundary_loss_is_the_mean_of_distance_times_probability() -> None:
    """Planted bugs: the distance of the predicted mask; the sum."""
    logits = logits_of(P).requires_grad_()

    loss = boundary_loss(logits, row(Y))

    assert loss.item() == pytest.approx((0.2 + 0.1 - 0.9 + 0.9 + 0.2) / 7)
    expected = [0.09 * phi / 7 for phi in PHI]  # p (1 - p) phi
    assert gradient(loss, logits).flatten().tolist() == pytest.approx(expected, abs=1e-7)


def test_the_hausdorff_loss_weighs_squared_errors_by_both_squared_distances() -> None:
    """d_y = 2 1 1 2 1 1 2 and d_p = 3 2 1 1 2 1 1. Planted bug: logits taken for probabilities."""
    logits = logits_of(P).requires_grad_()

    loss = hausdorff_dt_loss(logits, row(Y))

    weights = [13.0, 5.0, 2.0, 5.0, 5.0, 2.0, 5.0]
    errors = [0.1, 0.1, -0.9, -0.1, -0.1, 0.9, 0.1]
    assert loss.item() == pytest.approx(3.57 / 7, rel=1e-5)
    expected = [2 * error * weight * 0.09 / 7 for error, weight in zip(errors, weights, strict=True)]
    assert gradient(loss, logits).flatten().tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("name", "term"), [("hausdorff_dt", 3.57 / 7), ("boundary", 0.5 / 7)])
def test_a_distance_loss_is_added_to_the_plain_one_with_its_weight(
    name: Literal["hausdorff_dt", "boundary"], term: float
) -> None:
    """Planted bugs: the two losses exchanged; the weight left out."""
    config = CalibrationConfig(loss=name, distance_weight=0.25)

    loss = calibration_loss(logits_of(P), row(Y), config, seed=1)

    assert loss.item() == pytest.approx(segmentation_loss(logits_of(P), row(Y)).item() + 0.25 * term, rel=1e-5)


@pytest.mark.parametrize("config", [CalibrationConfig(loss="plain"), CalibrationConfig(loss="pbl", lam=0.0)])
def test_plain_fine_tuning_is_the_plain_loss_to_the_bit(config: CalibrationConfig) -> None:
    """Planted bug: `lam = 0` left to the perturbed loss, which sums in another order."""
    for seed in range(20):
        logits, target = noise(seed)
        assert torch.equal(calibration_loss(logits, target, config, seed), segmentation_loss(logits, target))


def test_the_perturbed_boundary_loss_gets_every_setting() -> None:
    """Planted bugs, one a setting: its default in its place."""
    _, target = noise(1)
    logits = torch.linspace(-4, 4, 8).expand(2, 1, 8, 8)  # the border is a column, mistakes are everywhere
    settings = {"region": "both", "radius": 3, "sigma": 0.7, "tau": 0.4, "lam": 0.6}
    config = CalibrationConfig.model_validate(settings)

    loss = calibration_loss(logits, target, config, seed=9)

    expected = perturbed_boundary_loss(
        logits, target, seed=9, region="both", radius=3, sigma=0.7, tau=0.4, lam=0.6, smooth=SMOOTH
    )
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("name", ["hausdorff_dt", "boundary"])
def test_distance_losses_of_half_precision_logits_are_float32_and_finite(
    name: Literal["hausdorff_dt", "boundary"],
) -> None:
    logits, target = noise(2)
    wide = 1e4 * logits.bfloat16()

    loss = calibration_loss(wide, target, CalibrationConfig(loss=name), seed=1)

    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
