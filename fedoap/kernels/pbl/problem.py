"""What the perturbed boundary loss is asked for and what it returns, whichever backend runs."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

Region: TypeAlias = Literal["error", "band", "both"]
Element: TypeAlias = Literal["square", "cross"]


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
class Recipe:
    """The options that say where noise goes, how strong it is and how much it counts."""

    region: Region
    radius: int
    element: Element
    tau: float
    sigma: float
    lam: float = 0.0
    smooth: float = 1.0

    @property
    def marked(self) -> bool:
        """Whether kernels prepare the band before they need it: a window of one step they find on the way."""
        return self.region != "error" and self.radius != 1
