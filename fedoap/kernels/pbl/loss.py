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

from typing import Literal, overload

import torch
from torch import Tensor

from fedoap.kernels import backend as backends
from fedoap.kernels.backend import Backend
from fedoap.kernels.pbl import op, opaque, reference
from fedoap.kernels.pbl.checks import NAME, check_recipe, check_tensors, seed_on
from fedoap.kernels.pbl.problem import BoundaryParts, Element, Perturbed, Recipe, Region


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
    backend: Backend = "auto",
) -> Perturbed:
    """Return the region to perturb and the perturbed logits; their gradient is that of the logits.

    Arguments and errors are those of `perturbed_boundary_loss`. On a GPU a target outside [0, 1] goes
    unnoticed here.
    """
    recipe = Recipe(region, radius, element, tau, sigma)
    check_recipe(recipe)
    check_tensors(logits, target)
    chosen = backends.choose(backend, NAME, logits.device)
    at = seed_on(seed, logits.device)
    if chosen == "eager" or logits.numel() == 0:
        perturb = opaque.perturb if torch.compiler.is_compiling() else reference.perturb
        return perturb(_widened(logits), target, at, recipe)
    return op.perturb(logits, target, at, recipe)


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

    A batch without any voxel costs 0; a logit that is NaN makes the loss NaN. Nothing waits for a GPU:
    there a target outside [0, 1] is not refused but makes the loss NaN. The gradient is the logits'
    alone and has no derivative.

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
        backend: which implementation runs.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the target leaves [0, 1] on a CPU, an option is out of
            range, or the backend cannot run.
    """
    recipe = Recipe(region, radius, element, tau, sigma, lam, smooth)
    check_recipe(recipe)
    check_tensors(logits, target)
    chosen = backends.choose(backend, NAME, logits.device)
    at = seed_on(seed, logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        if chosen == "eager" or logits.numel() == 0:  # a batch without voxels has nothing for a kernel
            plain = opaque.loss_and_parts if torch.compiler.is_compiling() else reference.loss_and_parts
            loss, parts = plain(_widened(logits), target, at, recipe)
        else:
            loss, parts = op.loss_and_parts(logits, target, at, recipe)
    return (loss, parts) if return_parts else loss


def _widened(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
