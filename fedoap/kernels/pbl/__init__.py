"""The perturbed boundary loss: `loss` is its public face, `reference` what every backend must reproduce."""

from fedoap.kernels.pbl.loss import perturbed_boundary, perturbed_boundary_loss
from fedoap.kernels.pbl.problem import BoundaryParts, Element, Perturbed, Region

__all__ = ["BoundaryParts", "Element", "Perturbed", "Region", "perturbed_boundary", "perturbed_boundary_loss"]
