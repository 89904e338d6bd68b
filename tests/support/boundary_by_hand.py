"""The perturbed boundary loss in float64 NumPy: formulas without autograd, and scipy's morphology."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from fedoap.kernels import Element, Region
from fedoap.kernels.philox import normal

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return smooth random logits, strong enough for tau = 0.75, and a yes-or-no target."""
    random = np.random.default_rng(sum(shape))
    sigma = (0, 0, *[1.0] * (len(shape) - 2))
    z, y = (ndimage.gaussian_filter(random.normal(size=shape), sigma) for _ in range(2))
    z = 6 * z / max(float(np.abs(z).max()), 1e-9)
    return torch.from_numpy(z).to(dtype), torch.from_numpy(y > 0)


def band_by_scipy(mask: Mask, radius: int, element: Element) -> Mask:
    """Return dilation minus erosion of each sample, voxels outside the image left out of every window."""
    dimensions = mask.ndim - 2
    window = ndimage.iterate_structure(
        ndimage.generate_binary_structure(dimensions, dimensions if element == "square" else 1), radius
    )
    band = np.zeros_like(mask)
    if radius == 0:
        return band
    for b in range(mask.shape[0]):
        grown = ndimage.binary_dilation(mask[b, 0], window, border_value=0)
        shrunk = ndimage.binary_erosion(mask[b, 0], window, border_value=1)
        band[b, 0] = grown & ~shrunk
    return band


def region_by_hand(z: Tensor, y: Tensor, region: Region, radius: int = 1, element: Element = "square") -> Mask:
    """Return where noise belongs for tau = 0.75."""
    logits = z.double().numpy()
    error: Mask = np.abs(1 / (1 + np.exp(-logits)) - y.double().numpy()) > 0.75
    if region == "error":
        return error
    band = band_by_scipy(logits > 0, radius, element)
    return band if region == "band" else error & band


def by_hand(
    z: Tensor, y: Tensor, region: Mask, *, seed: int, sigma: float, lam: float, smooth: float = 1e-5
) -> tuple[float, Array]:
    """Return loss and gradient with respect to the logits, from the formulas."""
    clean, target = z.double().numpy(), y.double().numpy()
    noise = normal(torch.tensor(seed), torch.arange(z.numel())).double().numpy().reshape(clean.shape)
    loss, gradient = 0.0, np.zeros_like(clean)
    for weight, logits in ((1 - lam, clean), (lam, clean + sigma * noise * region)):
        for b in range(len(clean)):
            value, slope = _sample(logits[b], target[b], smooth)
            loss += weight * value / len(clean)
            gradient[b] += weight * slope / len(clean)
    return loss, gradient


def relative(value: Tensor, expected: Array) -> float:
    """Return the relative root mean square error."""
    return float(np.linalg.norm(value.double().cpu().numpy() - expected) / np.linalg.norm(expected))


def _sample(z: Array, y: Array, smooth: float) -> tuple[float, Array]:
    p = 1 / (1 + np.exp(-z))
    bce = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    top, bottom = 2 * (p * y).sum() + smooth, p.sum() + y.sum() + smooth
    slope = (p - y) / z.size + (top / bottom - 2 * y) / bottom * p * (1 - p)
    return float(bce + 1 - top / bottom), slope
