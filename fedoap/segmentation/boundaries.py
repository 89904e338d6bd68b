"""The losses that calibration may minimise: the perturbed boundary loss, and those that it is compared with.

    hausdorff_dt   L + w mean (p - y)^2 (d_p^2 + d_y^2)   (Karimi and Salcudean 2019, eq. 8, arXiv:1904.10030)
    boundary       L + w mean phi_y p                      (Kervadec et al. 2019, eq. 5, arXiv:1812.07032)

L is the plain loss, p = sigmoid(z), d the distance of a voxel to the border of a mask (p is thresholded at
0.5), phi_y the signed distance to the border of y, negative inside. Distances are in voxels and constant to
the gradient; MONAI measures them, on the CPU unless cuCIM is installed. A mask that is empty or full has no
border, and all its distances are 0.

Shapes: B batch, one channel, *S spatial size.
"""

# MONAI takes seconds to import and only the distance losses need it
# ruff: noqa: PLC0415

import torch
from torch import Tensor

from fedoap.config import CalibrationConfig
from fedoap.kernels import perturbed_boundary_loss
from fedoap.segmentation.objectives import SMOOTH, segmentation_loss


def calibration_loss(logits: Tensor, target: Tensor, config: CalibrationConfig, seed: int) -> Tensor:
    """Return the loss that `calibration.loss` names; with `lam = 0` the perturbed one is the plain one, bit for bit."""
    match config.loss:
        case "pbl" if config.lam > 0:
            return perturbed_boundary_loss(
                logits,
                target,
                seed=seed,
                radius=config.radius,
                sigma=config.sigma,
                tau=config.tau,
                lam=config.lam,
                smooth=SMOOTH,
                region=config.region,
            )
        case "pbl" | "plain":
            return segmentation_loss(logits, target)
        case "hausdorff_dt":
            return segmentation_loss(logits, target) + config.distance_weight * hausdorff_dt_loss(logits, target)
        case "boundary":
            return segmentation_loss(logits, target) + config.distance_weight * boundary_loss(logits, target)


def hausdorff_dt_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean of (p - y)^2 (d_p^2 + d_y^2), float32, by MONAI."""
    from monai.losses.hausdorff_loss import HausdorffDTLoss

    with torch.autocast(logits.device.type, enabled=False):
        loss: Tensor = HausdorffDTLoss(include_background=True, sigmoid=True)(logits.float(), target.float())
    return loss


def boundary_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean of phi_y p, float32; p inside the mask makes it negative."""
    with torch.autocast(logits.device.type, enabled=False):
        return (signed_distance(target) * torch.sigmoid(logits.float())).mean()


@torch.no_grad()
def signed_distance(mask: Tensor) -> Tensor:
    """Return each voxel's distance to the border of masks (B, 1, *S): negative inside, 0 at the mask's border voxels.

    The definition is that of the authors' code and of the BoundaryLoss of MONAI 1.6.
    """
    from monai.transforms.utils import distance_transform_edt

    phi = torch.zeros(mask.shape, device=mask.device)
    for distance, inside in zip(phi, mask > 0.5, strict=True):
        if inside.any() and not inside.all():
            depth, outside = distance_transform_edt(inside), distance_transform_edt(~inside)
            distance.copy_(torch.where(inside, 1 - depth, outside))
    return phi
