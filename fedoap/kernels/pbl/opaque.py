"""Plain PyTorch as operators, into which compilers do not look.

How many voxels get noise is known when a call runs, not when it is compiled; and compiled code gives the bits of code
that is not (torch 2.13's compiler for CPUs gets the noise wrong).
"""

import torch
from torch import Tensor

from fedoap.kernels.once import once_differentiable
from fedoap.kernels.pbl import reference
from fedoap.kernels.pbl.checks import NAME, check_values
from fedoap.kernels.pbl.op import options_of, recipe_of
from fedoap.kernels.pbl.problem import BoundaryParts, Perturbed, Recipe


def loss_and_parts(z: Tensor, target: Tensor, seed: Tensor, recipe: Recipe) -> tuple[Tensor, BoundaryParts]:
    """Return what `reference.loss_and_parts` does."""
    wanted = torch.is_grad_enabled() and z.requires_grad
    loss, clean, noisy, voxels, _ = pbl_plain(z, target, seed, *options_of(recipe), wanted)
    return loss, BoundaryParts(clean, noisy, voxels)


def perturb(z: Tensor, target: Tensor, seed: Tensor, recipe: Recipe) -> Perturbed:
    """Return what `reference.perturb` does."""
    noisy, region = perturb_plain(z, target, seed, *options_of(recipe))
    return Perturbed(region, noisy)


@torch.library.custom_op("fedoap::pbl_plain", mutates_args=())
def pbl_plain(
    z: Tensor, target: Tensor, seed: Tensor, region: str, radius: int, element: str, tau: float, sigma: float,
    lam: float, smooth: float, with_slope: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what `reference.evaluate` does, an empty gradient where none is asked for."""
    check_values(target)  # nobody could while the call was compiled
    recipe = recipe_of(region, radius, element, tau, sigma, lam, smooth)
    loss, clean, noisy, voxels, dz = reference.evaluate(z, target, seed, recipe, with_slope=with_slope)
    return loss, clean, noisy, voxels, z.new_empty(0) if dz is None else dz


@pbl_plain.register_fake
def _(
    z: Tensor, target: Tensor, seed: Tensor, region: str, radius: int, element: str, tau: float, sigma: float,
    lam: float, smooth: float, with_slope: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, clean, noisy = (z.new_empty(shape) for shape in ((), z.shape[0], z.shape[0]))
    return loss, clean, noisy, z.new_empty(z.shape[0], dtype=torch.int64), z.new_empty(z.shape if with_slope else 0)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[4])


@once_differentiable(NAME)
def _gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    (dz,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return (dz * grad, *(None,) * 10)


pbl_plain.register_autograd(_gradient, setup_context=_keep)


@torch.library.custom_op("fedoap::perturb_plain", mutates_args=())
def perturb_plain(
    z: Tensor, target: Tensor, seed: Tensor, region: str, radius: int, element: str, tau: float, sigma: float,
    lam: float, smooth: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the perturbed logits, whose gradient is that of the logits, and the region."""
    check_values(target)
    made = reference.perturb(z, target, seed, recipe_of(region, radius, element, tau, sigma, lam, smooth))
    return made.logits.contiguous(), made.region.contiguous()


@perturb_plain.register_fake
def _(
    z: Tensor, target: Tensor, seed: Tensor, region: str, radius: int, element: str, tau: float, sigma: float,
    lam: float, smooth: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return z.new_empty(z.shape), z.new_empty(z.shape, dtype=torch.bool)


def _mark(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])


def _pass_on(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: object) -> tuple[Tensor | None, ...]:
    return (grad, *(None,) * 9)


perturb_plain.register_autograd(_pass_on, setup_context=_mark)
