"""The loss's operators, with interpreted kernels behind them, as autograd and torch.compile see them."""

import pytest
import torch
from torch import Tensor

from boundary_by_hand import case
from fedoap.kernels import Region, perturbed_boundary, perturbed_boundary_loss
from fedoap.kernels.pbl import op
from fedoap.kernels.pbl.problem import Recipe

RECIPE = Recipe("both", 2, "cross", tau=0.6, sigma=0.5, lam=0.3, smooth=0.1)
OPTIONS = (RECIPE.region, RECIPE.radius, RECIPE.element, RECIPE.tau, RECIPE.sigma, RECIPE.lam, RECIPE.smooth)
SEED = torch.tensor(5)


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (1, 1, 3, 4, 5)])
def test_triton_and_eager_agree_in_all_they_return(shape: tuple[int, ...]) -> None:
    z, y = case(shape)
    results = []
    for backend in ("triton", "eager"):
        logits = z.clone().requires_grad_()
        loss, parts = perturbed_boundary_loss(
            logits,
            y,
            seed=3,
            region="band",
            lam=0.4,
            return_parts=True,
            backend=backend,
        )
        (gradient,) = torch.autograd.grad([loss], [logits])
        assert not parts.clean.requires_grad
        results.append((loss.detach(), gradient, parts.clean, parts.perturbed, parts.voxels))

    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("region", "radius", "lam"), [("error", 1, 0.0), ("both", 1, 0.5), ("band", 2, 1.0)])
def test_gradients_agree_with_differences(region: Region, radius: int, lam: float) -> None:
    """Planted bugs: lam swapped in the backward pass, smooth missing in one of its sums."""
    z, y = case((2, 1, 1, 3), torch.float64)

    def function(logits: Tensor) -> Tensor:
        return perturbed_boundary_loss(
            logits, y, seed=2, region=region, radius=radius, sigma=0.5, lam=lam, smooth=0.3, backend="triton"
        )

    assert torch.autograd.gradcheck(function, (z.requires_grad_(),))


def test_a_gradient_may_come_in_expanded_or_sliced() -> None:
    z, y = case((1, 1, 4, 8))
    z.requires_grad_()

    def gradient(weight: Tensor) -> Tensor:
        loss = perturbed_boundary_loss(z, y, seed=1, backend="triton")
        (found,) = torch.autograd.grad([loss.expand(3)], [z], [weight])
        return found

    expanded = gradient(torch.ones(()).expand(3))
    sliced = gradient(torch.ones(6)[::2])
    (plain,) = torch.autograd.grad([perturbed_boundary_loss(z, y, seed=1, backend="triton")], [z])
    assert torch.allclose(expanded, 3 * plain)
    assert torch.equal(expanded, sliced)


def test_perturbed_logits_pass_their_gradient_on() -> None:
    z, y = case((2, 1, 5, 7), torch.float16)
    z.requires_grad_()

    made = perturbed_boundary(z, y, seed=3, region="band", backend="triton")
    (gradient,) = torch.autograd.grad([made.logits.sum()], [z])

    assert made.logits.dtype == torch.float32
    assert not made.region.requires_grad
    assert torch.equal(gradient, torch.ones_like(z))


def test_a_second_derivative_is_refused() -> None:
    z, y = case((1, 1, 4, 4))
    z.requires_grad_()
    loss = perturbed_boundary_loss(z, y, seed=1, backend="triton")
    (gradient,) = torch.autograd.grad([loss], [z], create_graph=True)

    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad([gradient.sum()], [z])


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 1, 0, 8), (2, 1, 8, 8, 0)])
def test_a_batch_without_voxels_costs_nothing(shape: tuple[int, ...]) -> None:
    z = torch.zeros(shape, requires_grad=True)

    loss, parts = perturbed_boundary_loss(z, torch.zeros(shape), seed=1, return_parts=True, backend="triton")
    torch.autograd.backward([loss])

    assert loss.item() == 0
    assert parts.voxels.tolist() == [0] * shape[0]


def test_operators_keep_pytorchs_rules() -> None:
    """Planted bugs: a fake with another dtype, a sample dimension missing in `sums`."""
    z, y = case((2, 1, 3, 5))
    torch.library.opcheck(op.pbl_forward, (z.requires_grad_(), y, SEED, *OPTIONS))
    torch.library.opcheck(op.perturbed_boundary, (z, y, SEED, *OPTIONS))
    found = op.pbl_forward(z.detach(), y, SEED, *OPTIONS)
    torch.library.opcheck(op.pbl_backward, (torch.ones(()), z.detach(), y, SEED, *found[4:], *OPTIONS))


def test_compiled_code_calls_the_operators() -> None:
    z, y = case((2, 1, 4, 8))

    def step(logits: Tensor, target: Tensor) -> Tensor:
        return perturbed_boundary_loss(logits, target, seed=SEED, region="both", backend="triton") * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(z.requires_grad_(), y)

    assert torch.equal(compiled, step(z, y))
