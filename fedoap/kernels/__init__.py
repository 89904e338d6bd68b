"""The two operations that FedOAP spends its time in, usable without the rest of fedoap.

* `decoupled_cross_attention`: one query set attends to an image's own tokens and to a global bank.
* `perturbed_boundary_loss`: BCE and Dice of clean and of perturbed logits, the noise laid where the
  prediction is wrong or near its edge; `perturbed_boundary` gives region and perturbed logits alone.

On a GPU both run as Triton kernels, elsewhere as plain PyTorch; `fedoap.kernels.backend` chooses. Importing
this package takes torch and the standard library, no GPU, no driver and no Triton.
"""

from fedoap.kernels.backend import Backend
from fedoap.kernels.dca import AttentionMode, Precision, decoupled_cross_attention
from fedoap.kernels.pbl import (
    BoundaryParts,
    Element,
    Perturbed,
    Region,
    perturbed_boundary,
    perturbed_boundary_loss,
)

__all__ = [
    "AttentionMode",
    "Backend",
    "BoundaryParts",
    "Element",
    "Perturbed",
    "Precision",
    "Region",
    "decoupled_cross_attention",
    "perturbed_boundary",
    "perturbed_boundary_loss",
]
