"""The perturbed boundary loss in plain PyTorch: what every other backend must reproduce."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fedoap.kernels.once import once_differentiable
from fedoap.kernels.pbl.checks import NAME, are_readable
from fedoap.kernels.pbl.problem import BoundaryParts, Element, Perturbed, Recipe
from fedoap.kernels.philox import normal


@dataclass(frozen=True, slots=True)
class _Logistic:
    """Logits, targets and what the loss takes of them, all of one shape."""

    y: Tensor
    p: Tensor
    bce: Tensor

    @classmethod
    def of(cls, z: Tensor, y: Tensor) -> Self:
        return cls(y, torch.sigmoid(z), F.binary_cross_entropy_with_logits(z, y, reduction="none"))


@dataclass(frozen=True, slots=True)
class _Sums:
    """Each sample's sums of BCE, p, y and p y, (B,)."""

    bce: Tensor
    p: Tensor
    y: Tensor
    py: Tensor

    def loss(self, volume: int, smooth: float) -> Tensor:
        """Return BCE + 1 - soft Dice of each sample."""
        return self.bce / volume + (1 - (2 * self.py + smooth) / (self.p + self.y + smooth))

    def slopes(self, smooth: float) -> tuple[Tensor, Tensor]:
        """Return a and b, (B, 1), with which 1 - Dice has the slope a - b y in p."""
        below = (self.p + self.y + smooth).reciprocal().unsqueeze(1)
        return (2 * self.py + smooth).unsqueeze(1) * below**2, 2 * below


def loss_and_parts(z: Tensor, target: Tensor, seed: Tensor, recipe: Recipe) -> tuple[Tensor, BoundaryParts]:
    """Return the loss, differentiable once, and its parts."""
    loss, clean, noisy, voxels = _Loss.apply(z, target, seed, recipe)
    return loss, BoundaryParts(clean, noisy, voxels)


class _Loss(torch.autograd.Function):
    """The loss and its gradient together: both need the same maps, and noise touches the region alone."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, z: Tensor, target: Tensor, seed: Tensor, recipe: Recipe
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        loss, clean, noisy, voxels, dz = evaluate(z, target, seed, recipe, with_slope=wanted)
        if dz is not None:
            ctx.save_for_backward(dz)
        ctx.mark_non_differentiable(clean, noisy, voxels)
        return loss, clean, noisy, voxels

    @staticmethod
    @once_differentiable(NAME)
    def backward(ctx: FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        (dz,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return dz * grad, None, None, None


def evaluate(
    z: Tensor, target: Tensor, seed: Tensor, recipe: Recipe, *, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the loss, each sample's clean loss, perturbed loss and voxels, and the loss's gradient if asked for."""
    region = _region(z, target, recipe)
    voxels = region.flatten(1).sum(1)
    if z.numel() == 0:
        none = z.new_zeros(z.shape[0])
        return none.sum(), none, none.clone(), voxels, torch.zeros_like(z) if with_slope else None
    loss, clean, noisy, dz = _loss_and_slope(z, target, seed, region, recipe, with_slope=with_slope)
    return loss, clean, noisy, voxels, dz


def _fair(target: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the target as numbers, NaN where it is outside [0, 1] and nobody looked."""
    y = target.to(dtype)
    return y if are_readable(target) else torch.where((y >= 0) & (y <= 1), y, torch.nan)


def _loss_and_slope(
    z: Tensor, target: Tensor, seed: Tensor, region: Tensor, recipe: Recipe, *, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    batch, volume, smooth = z.shape[0], z[0].numel(), recipe.smooth
    flat, y = z.reshape(batch, volume), _fair(target, z.dtype).reshape(batch, volume)
    at = _Logistic.of(flat, y)
    sums = _Sums(at.bce.sum(1), at.p.sum(1), y.sum(1), torch.linalg.vecdot(at.p, y))

    index = region.flatten().nonzero().squeeze(1)
    sample = index // volume
    near = _Logistic(*(x.flatten()[index] for x in (y, at.p, at.bce)))
    far = _Logistic.of(flat.flatten()[index] + _noise(seed, index, recipe.sigma, z.dtype), near.y)

    def changed(sum_: Tensor, change: Tensor) -> Tensor:
        return sum_.index_add(0, sample, change)

    moved = _Sums(
        changed(sums.bce, far.bce - near.bce),
        changed(sums.p, far.p - near.p),
        sums.y,
        changed(sums.py, (far.p - near.p) * near.y),
    )
    clean, noisy = sums.loss(volume, smooth), moved.loss(volume, smooth)
    loss = ((1 - recipe.lam) * clean + recipe.lam * noisy).mean()
    if not with_slope:
        return loss, clean, noisy, None
    a, b = sums.slopes(smooth)
    moved_a, moved_b = moved.slopes(smooth)
    mixed_a, mixed_b = torch.lerp(a, moved_a, recipe.lam), torch.lerp(b, moved_b, recipe.lam)
    dz = _slope(at, mixed_a, mixed_b, volume).div_(batch)
    change = _slope(far, moved_a[sample, 0], moved_b[sample, 0], volume)
    change -= _slope(near, moved_a[sample, 0], moved_b[sample, 0], volume)
    dz.view(-1).index_add_(0, index, change, alpha=recipe.lam / batch)
    return loss, clean, noisy, dz.view(z.shape)


def _slope(at: _Logistic, a: Tensor, b: Tensor, volume: int) -> Tensor:
    """Return (p - y) / V + p (1 - p) (a - b y)."""
    slope = torch.addcmul(a, b, at.y, value=-1).mul_(at.p).mul_(1 - at.p)
    return slope.add_(at.p, alpha=1 / volume).sub_(at.y, alpha=1 / volume)


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
    return torch.where(target.bool(), -z, z) > math.log(tau / (1 - tau))


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
    noise[index] = _noise(seed, index, sigma, z.dtype)
    return z + noise.view(z.shape)


def _noise(seed: Tensor, index: Tensor, sigma: float, dtype: torch.dtype) -> Tensor:
    return (sigma * normal(seed, index)).to(dtype)
