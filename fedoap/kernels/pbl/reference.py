"""The perturbed boundary loss in plain PyTorch: what every other backend must reproduce."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedoap.kernels.pbl.problem import BoundaryParts, Element, Perturbed, Recipe
from fedoap.kernels.philox import normal


def loss_and_parts(z: Tensor, target: Tensor, seed: Tensor, recipe: Recipe) -> tuple[Tensor, BoundaryParts]:
    """Return the loss by plain PyTorch: what every other backend must reproduce."""
    perturbed = perturb(z, target, seed, recipe)
    voxels = perturbed.region.flatten(1).sum(1)
    if z.numel() == 0:
        none = z.detach().new_zeros(z.shape[0])
        return z.sum(), BoundaryParts(none, none, voxels)
    y = target.to(z.dtype)
    clean, noisy = (_sample_losses(logits, y, recipe.smooth) for logits in (z, perturbed.logits))
    loss = ((1 - recipe.lam) * clean + recipe.lam * noisy).mean()
    return loss, BoundaryParts(clean.detach(), noisy.detach(), voxels)


def perturb(z: Tensor, target: Tensor, seed: Tensor, recipe: Recipe) -> Perturbed:
    """Return the region, a constant, and the logits with noise there."""
    region = _region(z.detach(), target, recipe)
    return Perturbed(region, _with_noise(z, region, seed, recipe.sigma))


def _region(z: Tensor, target: Tensor, recipe: Recipe) -> Tensor:
    match recipe.region:
        case "error":
            return _error(z, target, recipe.tau)
        case "band":
            return _band(z > 0, recipe.radius, recipe.element)
        case "both":
            return _band(z > 0, recipe.radius, recipe.element) & _error(z, target, recipe.tau)


def _error(z: Tensor, target: Tensor, tau: float) -> Tensor:
    """Return where |sigmoid(z) - y| > tau; for yes-or-no targets by thresholds of z, so free of rounding."""
    if target.is_floating_point():
        return (torch.sigmoid(z) - target.to(z.dtype)).abs() > tau
    threshold = math.log(tau / (1 - tau))
    return torch.where(target.bool(), z < -threshold, z > threshold)


def _band(mask: Tensor, radius: int, element: Element) -> Tensor:
    """Return the voxels whose window holds voxels inside and outside of the mask."""
    if mask.numel() == 0:
        return mask
    return _dilate(mask, radius, element) & _dilate(~mask, radius, element)


def _dilate(mask: Tensor, radius: int, element: Element) -> Tensor:
    axes = range(2, mask.dim())
    match element:
        case "square":
            for axis in axes:
                for _ in range(radius):
                    mask = _touched(mask, (axis,))
        case "cross":
            # within a box, `radius` steps to face neighbours reach just the voxels of the diamond
            for _ in range(radius):
                mask = _touched(mask, axes)
    return mask


def _touched(mask: Tensor, axes: Iterable[int]) -> Tensor:
    """Return the voxels in the mask or next to one along an axis; nothing comes in over the border."""
    grown = mask.clone()
    for axis in axes:
        rest = mask.shape[axis] - 1
        grown.narrow(axis, 1, rest).logical_or_(mask.narrow(axis, 0, rest))
        grown.narrow(axis, 0, rest).logical_or_(mask.narrow(axis, 1, rest))
    return grown


def _with_noise(z: Tensor, region: Tensor, seed: Tensor, sigma: float) -> Tensor:
    index = region.flatten().nonzero().squeeze(1)
    noise = torch.zeros_like(z, memory_format=torch.contiguous_format).flatten()
    noise[index] = sigma * normal(seed, index).to(z.dtype)
    return z + noise.view(z.shape)


def _sample_losses(z: Tensor, y: Tensor, smooth: float) -> Tensor:
    """Return BCE + 1 - soft Dice of each sample, (B,)."""
    z, y = z.flatten(1), y.flatten(1)
    p = torch.sigmoid(z)
    bce = F.binary_cross_entropy_with_logits(z, y, reduction="none").mean(1)
    dice = (2 * (p * y).sum(1) + smooth) / (p.sum(1) + y.sum(1) + smooth)
    return bce + (1 - dice)
