"""What a training step minimises: BCE with logits plus soft Dice, and what strategies add to it.

Shapes: B batch, one channel, then H W or D H W voxels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTH = 1e-5


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return BCE(z, y) + 1 - (2 sum p y + smooth) / (sum p + sum y + smooth), mean over samples, float32.

    p is sigmoid(z); the sums run over the voxels of one sample (the loss of FedOAP, arXiv 2511.18847).

    >>> round(float(segmentation_loss(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))), 4)
    1.0265
    """
    with torch.autocast(logits.device.type, enabled=False):
        z, y = logits.float().flatten(1), target.float().flatten(1)  # (B, voxels)
        p = torch.sigmoid(z)
        dice = (2 * (p * y).sum(1) + SMOOTH) / (p.sum(1) + y.sum(1) + SMOOTH)
        return F.binary_cross_entropy_with_logits(z, y) + 1 - dice.mean()


def inconsistency_loss(logits: Tensor, target: Tensor, others: Sequence[Tensor], lam: float) -> Tensor:
    """Return the segmentation loss + lam mean(u BCE(z, y)), where u says how much the others disagree.

    u is the standard deviation of p over the other networks, divided by its largest value in the batch, and
    constant to the gradient: FedDP's inconsistency-guided calibration (Wang et al. 2023,
    doi:10.1109/TMI.2023.3299206).
    """
    with torch.autocast(logits.device.type, enabled=False):
        z, y = logits.float(), target.float()
        u = torch.stack([torch.sigmoid(other.detach().float()) for other in others]).std(0)  # (B, 1, *S)
        u = u / u.max().clamp_min(torch.finfo(u.dtype).tiny)
        weighted = F.binary_cross_entropy_with_logits(z, y, weight=u)
    return segmentation_loss(logits, target) + lam * weighted


@torch.no_grad()
def add_proximal_gradient(parameters: Sequence[Tensor], anchors: Sequence[Tensor], mu: float) -> None:
    """Add mu (w - w_t), the gradient of mu/2 ||w - w_t||^2, to the gradients of the parameters that have one.

    The term is that of FedProx (Li et al. 2020, eq. 2, arXiv:1812.06127) and Ditto (Li et al. 2021, eq. 2,
    arXiv:2012.04221); w_t are the shared weights as the round began. A parameter without gradient took no
    part in the step and is left alone.
    """
    for w, w_t in zip(parameters, anchors, strict=True):
        if w.grad is not None:
            w.grad.add_(w - w_t, alpha=mu)
