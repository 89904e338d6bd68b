import math

import pytest
import torch
from torch import Tensor

from fedoap.kernels import perturbed_boundary_loss
from fedoap.segmentation.objectives import add_proximal_gradient, inconsistency_loss, segmentation_loss


def logits_of(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_the_loss_is_cross_entropy_plus_one_minus_dice_of_each_sample() -> None:
    """Planted bug: Dice taken over the batch, which is 2 * 1.75 / (2.75 + 3) here."""
    probabilities = torch.tensor([[0.5, 0.5], [0.75, 0.5], [0.25, 0.25]]).double()
    logits = torch.log(probabilities / (1 - probabilities)).view(3, 1, 1, 2)
    target = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]).view(3, 1, 1, 2)

    loss = segmentation_loss(logits, target).item()

    entropy = (2 * math.log(2) + math.log(4 / 3) + math.log(2) + 2 * math.log(4 / 3)) / 6
    dice = (2 * 0.5 / 2 + 2 * 1.25 / 3.25 + 1e-5 / 0.5) / 3
    assert loss == pytest.approx(entropy + 1 - dice, abs=1e-5)


def test_an_empty_mask_that_is_predicted_empty_costs_nothing() -> None:
    loss = segmentation_loss(torch.full((1, 1, 4, 4), -40.0), torch.zeros(1, 1, 4, 4))

    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_extreme_logits_give_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[[[1e4, -1e4]]]], requires_grad=True)

    loss = segmentation_loss(logits, torch.tensor([[[[0.0, 1.0]]]]))
    torch.autograd.backward([loss])

    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_calibration_without_perturbation_is_the_same_loss() -> None:
    """Planted bugs: another constant in one of the two, another smoothing, Dice over the batch."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 1, 8, 8, generator=generator)
    target = (torch.rand(3, 1, 8, 8, generator=generator) > 0.7).float()

    plain = segmentation_loss(logits, target)

    torch.testing.assert_close(perturbed_boundary_loss(logits, target, seed=1, lam=0.0), plain)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    logits = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    target = torch.zeros(2, 1, 64, 64)

    assert torch.equal(segmentation_loss(logits, target), segmentation_loss(logits.float(), target))


def with_gradient(values: list[float], gradient: list[float] | None) -> Tensor:
    w = torch.tensor(values, requires_grad=True)
    w.grad = None if gradient is None else torch.tensor(gradient)
    return w


def test_the_pull_adds_mu_times_the_distance_to_the_twin() -> None:
    """Planted bugs: 2 mu; the gradient of the distance instead of its square; the other sign."""
    w = with_gradient([3.0, -1.0], [0.5, 0.5])
    idle = with_gradient([9.0], None)

    add_proximal_gradient([w, idle], [torch.tensor([1.0, 1.0]), torch.zeros(1)], 0.25)

    assert w.grad is not None
    assert w.grad.tolist() == [1.0, 0.0]
    assert idle.grad is None


def test_calibration_minds_voxels_by_how_much_the_networks_differ() -> None:
    """p = 1/2, 3/4, 9/10 against 1/2 everywhere: differences 0, 1/4, 2/5, so u = 0, 5/8, 1, and lam (13/8) ln 2 / 3.

    Planted bugs: u not divided by its largest value; a gradient through u.
    """
    logits = torch.zeros(1, 1, 3, 1, requires_grad=True)
    one = torch.tensor([0.0, math.log(3), math.log(9)]).reshape(1, 1, 3, 1).requires_grad_()
    target = torch.ones(1, 1, 3, 1)

    loss = inconsistency_loss(logits, target, [one, torch.zeros(1, 1, 3, 1)], lam=0.5)
    torch.autograd.backward([loss - segmentation_loss(logits, target)])

    assert float((loss - segmentation_loss(logits, target)).detach()) == pytest.approx(13 / 48 * math.log(2), rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([0.0, -5 / 96, -1 / 12], abs=1e-6)
    assert one.grad is None


def test_networks_that_agree_add_nothing() -> None:
    logits, target = torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 2, 1)

    assert torch.equal(inconsistency_loss(logits, target, [logits, logits], 1.0), segmentation_loss(logits, target))
