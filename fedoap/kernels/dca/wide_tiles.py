"""Tile sizes of the wide route.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.

A tile is what one program makes: `rows` x `columns` of a product, `inner` elements of its contraction at
a time. The table is data, chosen by hardware and numbers, never measured at run time: the same call
gives the same bits on every card of one class.
"""

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from fedoap.kernels.dca.problem import Precision, Problem
from fedoap.kernels.hardware import Hardware, hardware

Numbers: TypeAlias = Literal["half", "tf32", "accurate"]
"""Operands of 16 bits; float32 rounded to tf32; float32 (or float64) as it is."""

KEYS = 128
"""Width of the key tiles of every entry of the table: the shape of saved weights must not depend on the card."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of one kernel makes, and how it is compiled."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def within(self, columns: int | None = None, inner: int | None = None) -> "Tile":
        """Return this tile, no wider and no deeper than a problem of so many columns or contracted elements."""
        return replace(
            self,
            columns=self.columns if columns is None else min(self.columns, _power_of_two(columns)),
            inner=self.inner if inner is None else min(self.inner, _power_of_two(inner)),
        )


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of the four kernels of products.

    `slopes.columns`, `average.inner` and `contract.inner` divide `scores.columns`; `contract.inner` and
    `slopes.rows` divide `block`.
    """

    scores: Tile
    """Queries x keys over channels: weights."""
    average: Tile
    """Queries x channels over keys: output."""
    slopes: Tile
    """Queries x keys over channels: gradients of the logits."""
    contract: Tile
    """Queries or keys x channels over keys or queries: gradients of the tokens."""
    block: int = 128
    """Queries that always lie in one chunk."""
    workspace: int = 32 * 2**20
    """Bytes for weights and their gradients, less than an H100's L2; no bit depends on it."""

    def count(self, keys: int) -> int:
        """Return the number of tiles that hold the keys of one source."""
        return -(-keys // self.scores.columns)

    def width(self, length: int, slots: int) -> int:
        """Return the number of columns of the weights: local keys and slots, each padded to whole tiles."""
        return (self.count(length) + self.count(slots)) * self.scores.columns

    def keeps_weights(self, problem: Problem) -> bool:
        """Return whether the weights are no larger than the queries, and hence kept for backward."""
        _, _, _, length, slots, channels = problem.sizes
        return 0 < self.width(length, slots) <= channels


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that a tile may have and that is not less than count."""
    return max(16, 1 << (count - 1).bit_length())


def tiles_for(problem: Problem) -> Tiles:
    """Return the table's tiles for a problem."""
    return TABLE[hardware(problem.q.device), numbers(problem.q.dtype, problem.precision)]


def numbers(dtype: torch.dtype, precision: Precision) -> Numbers:
    """Return the table's name for operands of a dtype multiplied at a precision."""
    if dtype.itemsize == 2:
        return "half"
    return "tf32" if dtype == torch.float32 and precision == "tf32" else "accurate"


def dot_precision(problem: Problem) -> Precision:
    """Return the precision to compile for; one for all dtypes that it makes no difference to."""
    return problem.precision if problem.q.dtype == torch.float32 else "ieee"


TABLE: dict[tuple[Hardware, Numbers], Tiles] = {
    ("hopper", "half"): Tiles(
        scores=Tile(128, 128, 64, 8, 4),
        average=Tile(64, 256, 64, 8, 3),
        slopes=Tile(128, 128, 64, 8, 4),
        contract=Tile(64, 256, 64, 8, 3),
    ),
    ("ampere", "half"): Tiles(
        scores=Tile(128, 128, 64, 8, 3),
        average=Tile(128, 64, 64, 8, 3),
        slopes=Tile(128, 64, 32, 8, 3),
        contract=Tile(128, 128, 64, 8, 3),
    ),
    ("ada", "half"): Tiles(
        scores=Tile(128, 128, 64, 8, 2),
        average=Tile(128, 64, 64, 8, 2),
        slopes=Tile(128, 64, 32, 8, 3),
        contract=Tile(128, 128, 64, 8, 2),
    ),
    ("cdna", "half"): Tiles(
        scores=Tile(128, 128, 64, 4, 2),
        average=Tile(128, 128, 64, 4, 2),
        slopes=Tile(128, 64, 64, 4, 2),
        contract=Tile(128, 128, 64, 4, 2),
    ),
    ("hopper", "tf32"): Tiles(
        scores=Tile(128, 128, 32, 8, 3),
        average=Tile(128, 128, 32, 8, 3),
        slopes=Tile(128, 64, 32, 8, 3),
        contract=Tile(128, 128, 32, 8, 3),
    ),
    ("ampere", "tf32"): Tiles(
        scores=Tile(128, 128, 32, 8, 3),
        average=Tile(128, 64, 32, 8, 3),
        slopes=Tile(128, 64, 32, 8, 3),
        contract=Tile(128, 64, 32, 8, 3),
    ),
    ("ada", "tf32"): Tiles(
        scores=Tile(128, 128, 32, 8, 2),
        average=Tile(128, 64, 32, 8, 2),
        slopes=Tile(128, 64, 32, 8, 2),
        contract=Tile(128, 64, 16, 8, 2),
    ),
    ("cdna", "tf32"): Tiles(
        scores=Tile(128, 128, 32, 4, 1),
        average=Tile(128, 128, 32, 4, 1),
        slopes=Tile(64, 64, 32, 4, 1),
        contract=Tile(128, 128, 32, 4, 1),
    ),
    ("hopper", "accurate"): Tiles(
        scores=Tile(128, 128, 16, 8, 2),
        average=Tile(64, 128, 16, 8, 2),
        slopes=Tile(64, 64, 16, 8, 2),
        contract=Tile(64, 128, 16, 8, 2),
    ),
    ("ampere", "accurate"): Tiles(
        scores=Tile(64, 128, 16, 8, 2),
        average=Tile(64, 128, 16, 8, 2),
        slopes=Tile(64, 64, 16, 8, 2),
        contract=Tile(64, 64, 16, 8, 2),
    ),
    ("ada", "accurate"): Tiles(
        scores=Tile(64, 128, 16, 8, 2),
        average=Tile(64, 128, 16, 8, 2),
        slopes=Tile(64, 64, 16, 8, 2),
        contract=Tile(64, 64, 16, 8, 2),
    ),
    ("cdna", "accurate"): Tiles(
        scores=Tile(64, 128, 16, 4, 1),
        average=Tile(64, 128, 16, 4, 1),
        slopes=Tile(64, 64, 16, 4, 1),
        contract=Tile(64, 128, 16, 4, 1),
    ),
}
"""None of these spills, in Triton 3.6 and 3.9."""

CANDIDATES: dict[Numbers, dict[str, tuple[Tile, ...]]] = {
    "half": {
        "scores": (
            Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 128, 128, 8, 2), Tile(64, 128, 64, 4, 4),
            Tile(64, 128, 128, 4, 2), Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3),
        ),
        "average": (
            Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 128, 128, 8, 2), Tile(64, 256, 64, 8, 3),
            Tile(64, 128, 64, 4, 3), Tile(128, 64, 64, 4, 4), Tile(128, 128, 32, 8, 5),
        ),
        "slopes": (
            Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 128, 64, 4, 3),
            Tile(64, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(128, 64, 64, 4, 4),
        ),
        "contract": (
            Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 3),
            Tile(64, 128, 64, 4, 3), Tile(64, 256, 64, 8, 3), Tile(128, 64, 64, 4, 4), Tile(128, 128, 32, 8, 5),
        ),
    },
}  # fmt: skip
"""What a sweep on a hopper tries in the place of each tile of the table; all compile without a spill there."""
