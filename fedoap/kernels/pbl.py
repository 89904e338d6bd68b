"""The perturbed boundary loss: BCE and Dice of clean logits and of logits with noise near mistakes.

    PBL = (1 - lam) L(z, y) + lam L(z~, y)        z~ = z + sigma * eps * 1[R]
    L   = mean over samples of BCE(z, y) + 1 - (2 sum p y + smooth) / (sum p + sum y + smooth)

`error` is FedOAP's region (arXiv 2511.18847): R = |sigmoid(z) - y| > tau. `band` and `both` are this
project's: the band holds each voxel whose window meets both sides of z > 0 (windows end at the
image's border), `both` is its intersection with the error. The gradient flows through z in both
terms, R and eps are constants; eps depends on the seed and a voxel's global index only (`philox`).

Shapes: B batch, one channel, spatial size (H, W) or (D, H, W). Half-precision logits are computed in
float32.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fedoap.kernels import backend as backends
from fedoap.kernels.backend import Backend
from fedoap.kernels.philox import normal

Region: TypeAlias = Literal["error", "band", "both"]
Element: TypeAlias = Literal["square", "cross"]

_NAME = "perturbed_boundary_loss"


@dataclass(frozen=True, slots=True)
class Perturbed:
    """Where noise was laid (bool, the logits' shape) and the logits with it, float32 or float64."""

    region: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class BoundaryParts:
    """Each sample's share of the loss, detached, all of shape (B,)."""

    clean: Tensor
    perturbed: Tensor
    voxels: Tensor
    """Voxels in the region, int64."""


@dataclass(frozen=True, slots=True)
class _Recipe:
    """The options that say where noise goes, how strong it is and how much it counts."""

    region: Region
    radius: int
    element: Element
    tau: float
    sigma: float
    lam: float = 0.0
    smooth: float = 1.0


def _eager(z: Tensor, target: Tensor, seed: Tensor, recipe: _Recipe) -> tuple[Tensor, BoundaryParts]:
    """Return the loss by plain PyTorch: what every other backend must reproduce."""
    perturbed = _perturbed(z, target, seed, recipe)
    voxels = perturbed.region.flatten(1).sum(1)
    if z.numel() == 0:
        none = z.detach().new_zeros(z.shape[0])
        return z.sum(), BoundaryParts(none, none, voxels)
    y = target.to(z.dtype)
    clean, noisy = (_sample_losses(logits, y, recipe.smooth) for logits in (z, perturbed.logits))
    loss = ((1 - recipe.lam) * clean + recipe.lam * noisy).mean()
    return loss, BoundaryParts(clean.detach(), noisy.detach(), voxels)


def _perturbed(z: Tensor, target: Tensor, seed: Tensor, recipe: _Recipe) -> Perturbed:
    region = _region(z.detach(), target, recipe)
    return Perturbed(region, _with_noise(z, region, seed, recipe.sigma))


def _region(z: Tensor, target: Tensor, recipe: _Recipe) -> Tensor:
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
    return bce + 1 - dice


def perturbed_boundary(
    logits: Tensor,
    target: Tensor,
    *,
    seed: Tensor | int,
    radius: int = 1,
    element: Element = "square",
    sigma: float = 0.1,
    tau: float = 0.75,
    region: Region = "error",
) -> Perturbed:
    """Return the region to perturb and the perturbed logits; their gradient is that of the logits.

    Arguments and errors are those of `perturbed_boundary_loss`.
    """
    recipe = _Recipe(region, radius, element, tau, sigma)
    _check_recipe(recipe)
    _check_tensors(logits, target)
    return _perturbed(_widened(logits), target, _seed(seed, logits.device), recipe)


@overload
def perturbed_boundary_loss(
    logits: Tensor, target: Tensor, *, seed: Tensor | int, radius: int = 1, element: Element = "square",
    sigma: float = 0.1, tau: float = 0.75, lam: float = 0.1, smooth: float = 1e-5, region: Region = "error",
    return_parts: Literal[False] = False, backend: Backend = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def perturbed_boundary_loss(
    logits: Tensor, target: Tensor, *, seed: Tensor | int, radius: int = 1, element: Element = "square",
    sigma: float = 0.1, tau: float = 0.75, lam: float = 0.1, smooth: float = 1e-5, region: Region = "error",
    return_parts: Literal[True], backend: Backend = "auto",
) -> tuple[Tensor, BoundaryParts]: ...  # fmt: skip


def perturbed_boundary_loss(
    logits: Tensor,
    target: Tensor,
    *,
    seed: Tensor | int,
    radius: int = 1,
    element: Element = "square",
    sigma: float = 0.1,
    tau: float = 0.75,
    lam: float = 0.1,
    smooth: float = 1e-5,
    region: Region = "error",
    return_parts: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, BoundaryParts]:
    """Return the perturbed boundary loss, a float32 scalar (float64 for float64 logits).

    A batch without any voxel costs 0; a logit that is NaN makes the loss NaN.

    Args:
        logits: (B, 1, H, W) or (B, 1, D, H, W), any float.
        target: the logits' shape; bool, uint8 of 0 and 1, or float in [0, 1].
        seed: of the noise; an int64 tensor of one element, or an int.
        radius: half-width of the band's window in voxels.
        element: the band's window: all voxels within `radius` along each axis (`square`), or those
            reached by `radius` steps to face neighbours (`cross`).
        sigma: standard deviation of the noise.
        tau: smallest |sigmoid(z) - y| that counts as error.
        lam: weight of the perturbed term.
        smooth: added to numerator and denominator of Dice.
        region: which voxels get noise.
        return_parts: also return each sample's two losses and count of voxels.
        backend: `auto` or `eager`; this version has no Triton kernels.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the target leaves [0, 1], or an option does.
        NotImplementedError: backend `triton`.
    """
    chosen = backends.choose(backend, _NAME)
    recipe = _Recipe(region, radius, element, tau, sigma, lam, smooth)
    _check_recipe(recipe)
    _check_tensors(logits, target)
    with torch.autocast(logits.device.type, enabled=False):
        match chosen:
            case "eager":
                loss, parts = _eager(_widened(logits), target, _seed(seed, logits.device), recipe)
    return (loss, parts) if return_parts else loss


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _seed(seed: Tensor | int, device: torch.device) -> Tensor:
    """Return the seed as one int64 value on the device."""
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{_NAME}: seed is {seed}, but must fit 64 bits")
        return torch.tensor(seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"{_NAME}: seed is {seed.dtype} of {seed.numel()} elements, but must be one int64")
    if seed.device != device:
        raise ValueError(f"{_NAME}: seed is on {seed.device}, but the logits are on {device}")
    return seed.reshape(())


def _check_recipe(recipe: _Recipe) -> None:
    if recipe.region not in get_args(Region):
        raise ValueError(f"{_NAME}: region is {recipe.region!r}, but must be one of {', '.join(get_args(Region))}")
    if recipe.element not in get_args(Element):
        raise ValueError(f"{_NAME}: element is {recipe.element!r}, but must be one of {', '.join(get_args(Element))}")
    if recipe.radius < 0:
        raise ValueError(f"{_NAME}: radius is {recipe.radius}, but must be 0 or more")
    if not 0 < recipe.tau < 1:
        raise ValueError(f"{_NAME}: tau is {recipe.tau}, but must lie between 0 and 1")
    if not 0 <= recipe.sigma < math.inf:
        raise ValueError(f"{_NAME}: sigma is {recipe.sigma}, but must be 0 or more")
    if not 0 <= recipe.lam <= 1:
        raise ValueError(f"{_NAME}: lam is {recipe.lam}, but must lie in [0, 1]")
    if not 0 < recipe.smooth < math.inf:
        raise ValueError(f"{_NAME}: smooth is {recipe.smooth}, but must be above 0")


def _check_tensors(logits: Tensor, target: Tensor) -> None:
    shape = tuple(logits.shape)
    if len(shape) not in (4, 5) or shape[1] != 1:
        raise ValueError(f"{_NAME}: logits have shape {shape}, but must be (B, 1, H, W) or (B, 1, D, H, W)")
    if not logits.is_floating_point():
        raise ValueError(f"{_NAME}: logits are {logits.dtype}, but must be a float")
    if tuple(target.shape) != shape:
        raise ValueError(f"{_NAME}: target has shape {tuple(target.shape)}, but the logits have {shape}")
    if target.device != logits.device:
        raise ValueError(f"{_NAME}: target is on {target.device}, but the logits are on {logits.device}")
    if not target.is_floating_point() and target.dtype not in (torch.bool, torch.uint8):
        raise ValueError(f"{_NAME}: target is {target.dtype}, but must be bool, uint8 or a float")
    _check_values(target)


def _check_values(target: Tensor) -> None:
    if target.dtype == torch.bool or target.numel() == 0:
        return
    low, high = (float(value) for value in target.aminmax())
    if not (low >= 0 and high <= 1):  # also refuses NaN
        raise ValueError(f"{_NAME}: target ranges from {low:g} to {high:g}, but must stay in [0, 1]")
