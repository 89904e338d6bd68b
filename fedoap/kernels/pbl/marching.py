"""How the programs of a pass divide a batch: what the kernels of region.py are launched with."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedoap.kernels.hardware import hardware
from fedoap.kernels.pbl.problem import Recipe
from fedoap.kernels.pbl.region import BAND, BOTH, ERROR, MARCHED, MARKED, NO_EDGE
from fedoap.kernels.pbl.tiles import Pass, Tiles, steps_of, tiles_for

_REGIONS = {"error": ERROR.value, "band": BAND.value, "both": BOTH.value}


@dataclass(frozen=True, slots=True)
class March:
    """A batch as planes of rows of groups, and each program's share of it."""

    logits: Tensor
    target: Tensor
    """Both dense within a sample; bool as uint8."""
    vec: int
    """Voxels in a group."""
    depth: int
    rows: int
    row_groups: int
    steps: int
    programs: int
    """Of one sample."""
    region: int
    edge: int
    cross: bool
    threshold: float
    tiles: Tiles

    @property
    def volume(self) -> int:
        """Voxels of a sample."""
        return self.depth * self.rows * self.row_groups * self.vec

    @property
    def line(self) -> int:
        """Words of 32 voxels in a row."""
        return -(-self.row_groups * self.vec // 32)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The kernels' whole numbers, in their order."""
        strides = (_sample_stride(tensor) // self.vec for tensor in (self.logits, self.target))
        return (*strides, self.depth, self.rows, self.row_groups, self.steps, self.programs, self.line)

    @property
    def variant(self) -> tuple[int | bool, ...]:
        """The kernels' constants, in their order."""
        return (self.region, self.edge, self.cross, self.rows > 1, self.vec, self.tiles.lanes)


def march_of(logits: Tensor, target: Tensor, recipe: Recipe, part: Pass, tiles: Tiles | None = None) -> March:
    """Return how to march through a batch that has voxels."""
    tiles = tiles or tiles_for(hardware(logits.device), part)
    z, y = _dense(logits), _dense(target.view(torch.uint8) if target.dtype == torch.bool else target)
    edge = NO_EDGE if recipe.region == "error" else MARKED if recipe.marked else MARCHED
    *planes, width = z.shape[2:]
    depth, rows = (planes[0], 1) if len(planes) == 1 else planes
    if edge == NO_EDGE:
        depth, rows, width = 1, 1, depth * rows * width
    vec = _vec(z, y, width)
    groups = width // vec
    if edge == NO_EDGE:
        # planes are what a program takes in a step: a run of groups without rows
        steps = steps_of(tiles, -(-groups // tiles.lanes), groups * z.shape[0])
        programs = -(-groups // (tiles.lanes * steps))
    else:
        steps = steps_of(tiles, depth, depth * rows * groups * z.shape[0])
        marches = -(-depth // steps)
        programs = -(-marches * rows * groups // tiles.lanes)
    return March(
        z, y, vec, depth, rows, groups, steps, programs,
        _REGIONS[recipe.region], edge.value, recipe.element == "cross", _threshold(target, recipe.tau), tiles,
    )  # fmt: skip


def _dense(tensor: Tensor) -> Tensor:
    """Return the tensor with contiguous samples, itself where it has them."""
    return tensor if tensor[:1].is_contiguous() else tensor.contiguous()


def _vec(z: Tensor, y: Tensor, width: int) -> int:
    """Return the voxels of a group: as many as fill 16 bytes, where rows and samples begin at such a group."""
    for vec in (8, 4):
        # float64 takes two loads: noise comes in fours
        if vec * min(z.element_size(), 4) <= 16 and all(n % vec == 0 for n in (width, *map(_sample_stride, (z, y)))):
            return vec
    return 1


def _sample_stride(tensor: Tensor) -> int:
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def _threshold(target: Tensor, tau: float) -> float:
    return tau if target.is_floating_point() else math.log(tau / (1 - tau))
