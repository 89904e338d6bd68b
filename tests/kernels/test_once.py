"""Second derivatives of the plain PyTorch implementations are refused, never taken for 0."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedoap.kernels import decoupled_cross_attention, perturbed_boundary_loss


def attention(x: Tensor) -> Tensor:
    tokens = x.view(1, 1, 8, 8)
    return decoupled_cross_attention(tokens, tokens, tokens, tokens[0], tokens[0]).sum()


def boundary(x: Tensor) -> Tensor:
    return perturbed_boundary_loss(x, torch.zeros(1, 1, 8, 8), seed=1)


@pytest.mark.parametrize("operation", [attention, boundary])
def test_a_penalty_on_the_gradient_is_refused(operation: Callable[[Tensor], Tensor]) -> None:
    """Planted bug: torch.autograd.function.once_differentiable, to which a loss's gradient is a constant."""
    x = torch.linspace(-2, 2, 64).view(1, 1, 8, 8).requires_grad_()
    value = operation(x)

    (gradient,) = torch.autograd.grad([value], [x], create_graph=True)

    with pytest.raises(RuntimeError, match="its gradient is differentiated, but has no derivative"):
        torch.autograd.backward([value + gradient.square().sum()])


@pytest.mark.parametrize("operation", [attention, boundary])
def test_the_first_derivative_is_the_same_either_way(operation: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-2, 2, 64).view(1, 1, 8, 8).requires_grad_()

    plain, graphed = (torch.autograd.grad([operation(x)], [x], create_graph=c)[0] for c in (False, True))

    assert torch.equal(plain, graphed)
    assert graphed.requires_grad
    assert not plain.requires_grad
