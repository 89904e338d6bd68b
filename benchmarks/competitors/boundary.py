"""The perturbed boundary loss and what a user would otherwise run.

B images, one channel, spatial size (H, W) or (D, H, W); float32 logits, a byte a voxel of target.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fedoap.kernels import perturbed_boundary_loss
from fedoap.kernels.philox import normal

SIGMA, TAU, LAM, SMOOTH = 0.1, 0.75, 0.1, 1e-5


@dataclass(frozen=True, slots=True)
class ImageShape:
    """Sizes of one batch of images."""

    b: int
    spatial: tuple[int, ...]

    def __str__(self) -> str:
        return f"B{self.b} {'x'.join(map(str, self.spatial))}"

    @property
    def size(self) -> tuple[int, ...]:
        """Of the logits: a channel after the batch."""
        return (self.b, 1, *self.spatial)

    def flops(self, _part: str) -> float:
        """None that count beside the bytes."""
        return 0.0

    def bytes(self, part: str, itemsize: int) -> float:
        """The least that goes through memory: logits and target read, backwards again, the gradient written."""
        voxels = math.prod(self.size)
        forward, backward = voxels * (itemsize + 1), voxels * (2 * itemsize + 1)
        return {"forward": forward, "backward": backward, "both": forward + backward}[part]


@dataclass(frozen=True, slots=True)
class Boundary:
    """One call's tensors; `noise` in place of fresh noise makes competitors comparable."""

    shape: ImageShape
    logits: Tensor
    target: Tensor
    seed: Tensor
    noise: Tensor | None = None

    @classmethod
    def random(cls, shape: ImageShape, device: torch.device, dtype: torch.dtype) -> Self:
        """Return a ball in each image, 4 % of it, its logits wrong along parts of its edge like a trained network's."""
        generator = torch.Generator(device).manual_seed(0)
        dimensions = len(shape.spatial)
        pool, radius = (F.avg_pool2d, 0.23) if dimensions == 2 else (F.avg_pool3d, 0.42)
        axes = [torch.linspace(-1, 1, n, device=device) for n in shape.spatial]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        centre = torch.rand(shape.b, dimensions, *[1] * dimensions, generator=generator, device=device) - 0.5
        outside = (grid - centre).square().sum(1, keepdim=True).sqrt() - radius  # (B, 1, *S)
        change = pool(torch.randn(shape.size, generator=generator, device=device), 15, stride=1, padding=7)
        logits = (1.5 * change / change.std() - 30 * outside).clamp(-8, 8)
        return cls(
            shape, logits.to(dtype).requires_grad_(), (outside < 0).to(torch.uint8), torch.tensor(1, device=device)
        )

    @classmethod
    def blank(cls, shape: ImageShape, device: torch.device, dtype: torch.dtype) -> Self:
        """Return zeros."""
        logits = torch.zeros(shape.size, dtype=dtype, device=device, requires_grad=True)
        target = torch.zeros(shape.size, dtype=torch.uint8, device=device)
        return cls(shape, logits, target, torch.tensor(1, device=device))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return (self.logits,)

    def to(self, dtype: torch.dtype) -> "Boundary":
        """Return a detached copy of the logits in another dtype."""
        return replace(self, logits=self.logits.detach().to(dtype).requires_grad_())

    def with_our_noise(self) -> "Boundary":
        """Return the same with the noise that this project lays."""
        index = torch.arange(self.logits.numel(), device=self.logits.device)
        return replace(self, noise=normal(self.seed, index).view_as(self.logits))


Compute: TypeAlias = Callable[[Boundary], Tensor]


def fedoap(x: Boundary) -> Tensor:
    """Return this project's loss."""
    return perturbed_boundary_loss(x.logits, x.target, seed=x.seed, region="both")


def reference(x: Boundary) -> Tensor:
    """Return this project's loss by plain PyTorch."""
    return perturbed_boundary_loss(x.logits, x.target, seed=x.seed, region="both", backend="eager")


def formula(x: Boundary) -> Tensor:
    """Return the loss as it reads, by pooling; noise is laid for every voxel, by PyTorch where none is given."""
    return _formula(x.logits, x.target, x.noise)


def _formula(z: Tensor, target: Tensor, noise: Tensor | None) -> Tensor:
    pool = F.max_pool2d if z.dim() == 4 else F.max_pool3d
    mask = (z.detach() > 0).float()
    return _loss(z, target, noise, pool(mask, 3, 1, 1) + pool(-mask, 3, 1, 1) > 0)


def _loss(z: Tensor, target: Tensor, noise: Tensor | None, band: Tensor) -> Tensor:
    y = target.float()
    error = (torch.sigmoid(z.detach()) - y).abs() > TAU
    noise = torch.randn_like(z) if noise is None else noise
    return (1 - LAM) * _bce_dice(z, y) + LAM * _bce_dice(z + SIGMA * noise * (band & error), y)


def _bce_dice(z: Tensor, y: Tensor) -> Tensor:
    p, axes = torch.sigmoid(z), tuple(range(1, z.dim()))
    dice = (2 * (p * y).sum(axes) + SMOOTH) / (p.sum(axes) + y.sum(axes) + SMOOTH)
    return F.binary_cross_entropy_with_logits(z, y) + (1 - dice).mean()


@cache
def _compiled_formula(mode: str) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(_formula, mode=mode, dynamic=False)
    return compiled


def compiled(x: Boundary, mode: str = "default") -> Tensor:
    """Return what torch.compile makes of `formula`."""
    return _compiled_formula(mode)(x.logits, x.target, x.noise)


def kornia(x: Boundary) -> Tensor:
    """Return the loss with kornia's morphological gradient."""
    from kornia.morphology import gradient  # type: ignore[import-not-found,unused-ignore]

    if len(x.shape.spatial) != 2:
        raise NotImplementedError("kornia's morphology takes images of two dimensions")
    mask = (x.logits.detach() > 0).float()
    return _loss(x.logits, x.target, x.noise, gradient(mask, torch.ones(3, 3, device=mask.device)) > 0)


def monai(x: Boundary) -> Tensor:
    """Return the loss with MONAI's mask edges, an image at a time; they lie inside, where the band has both sides."""
    from monai.metrics.utils import get_mask_edges

    mask = x.logits.detach() > 0
    edges = [get_mask_edges(image[0], torch.zeros_like(image[0]), crop=False)[0] for image in mask]
    band = torch.stack([torch.as_tensor(edge, device=mask.device) for edge in edges])[:, None]
    return _loss(x.logits, x.target, x.noise, band)


CPU: dict[str, Compute] = {"fedoap": fedoap, "formula": formula}
"""What is worth timing where there is no GPU."""

GPU: dict[str, Compute] = {
    "fedoap": fedoap,
    "fedoap again": fedoap,
    "formula": formula,
    "formula, compiled": compiled,
    "formula, max-autotune": partial(compiled, mode="max-autotune-no-cudagraphs"),
    "kornia": kornia,
    "monai edges": monai,
}
"""By name; "fedoap again" tells the noise of the timing."""

OTHER_RESULT = frozenset({"monai edges"})
"""What computes another band and is timed without being compared."""
