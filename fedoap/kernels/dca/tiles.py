"""Tile sizes of the flash route.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.

The table is data: sizes that compile without spilling registers, fixed by timings where a card was at
hand, and never measured at run time. No size follows a card's count of processors, so a call gives the
same bits on every card of one class.
"""

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from fedoap.kernels.dca.problem import Problem
from fedoap.kernels.hardware import Hardware, hardware

Numbers: TypeAlias = Literal["half", "tf32"]
"""Operands of 16 bits, or float32 rounded to tf32 by the tensor cores."""

FORWARD_CHANNELS: dict[Numbers, int] = {"half": 256, "tf32": 128}
BACKWARD_CHANNELS: dict[Numbers, int] = {"half": 128, "tf32": 64}
"""What this route is for: with more channels there is no tile that does not spill."""

PROGRAMS = 132
"""Programs that fill a card: an H100's processors, and a constant everywhere."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries x keys that a program holds at a time, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of the three kernels that multiply matrices."""

    attend: Tile
    dq: Tile
    dkv: Tile
    """Its programs hold `keys` and pass over `queries`."""
    rows: int = 32
    """Queries that one program of the row statistics reads."""
    programs: int = PROGRAMS
    """Programs that gradients of keys should have at least."""

    def splits(self, problem: Problem) -> int:
        """Return into how many parts the batch is divided for the bank's gradients.

        The least that leaves no program more than its share of the work of `programs` equal ones.
        """
        batch, heads, _, length, slots, _ = problem.sizes
        blocks = heads * (-(-length // self.dkv.keys) + -(-slots // self.dkv.keys))
        return max(1, min(batch, -(-self.programs // max(blocks, 1))))


def padded(channels: int) -> int:
    """Return the power of two that channels are padded to: products take no less than 16."""
    return max(16, 1 << (channels - 1).bit_length())


def choose(problem: Problem) -> Tiles:
    """Return the tiles of a call; they depend on the class of card, numbers, D and whether it is gated alone."""
    key = hardware(problem.q.device), numbers(problem.q.dtype), max(64, padded(problem.q.shape[3]))
    tiles = TABLE[key]
    return tiles if problem.gate is None or key not in GATED else replace(tiles, attend=GATED[key])


def numbers(dtype: torch.dtype) -> Numbers:
    """Return the table's name for operands of a dtype."""
    return "half" if dtype.itemsize == 2 else "tf32"


_WIDE = (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
"""Of gradients that the wide route computes: whatever compiles."""

TABLE: dict[tuple[Hardware, Numbers, int], Tiles] = {
    ("hopper", "half", 64): Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 4, 2)),
    ("hopper", "half", 128): Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
    ("hopper", "half", 256): Tiles(Tile(64, 32, 4, 3), *_WIDE),
    ("hopper", "tf32", 64): Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    ("hopper", "tf32", 128): Tiles(Tile(128, 16, 8, 3), *_WIDE),
    ("ampere", "half", 64): Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
    ("ampere", "half", 128): Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 64, 8, 2)),
    ("ampere", "half", 256): Tiles(Tile(32, 16, 8, 2), *_WIDE),
    ("ampere", "tf32", 64): Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("ampere", "tf32", 128): Tiles(Tile(16, 32, 4, 2), *_WIDE),
    ("ada", "half", 64): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    ("ada", "half", 128): Tiles(Tile(128, 32, 8, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),
    ("ada", "half", 256): Tiles(Tile(32, 32, 8, 2), *_WIDE),
    ("ada", "tf32", 64): Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    ("ada", "tf32", 128): Tiles(Tile(32, 32, 8, 2), *_WIDE),
    ("cdna", "half", 64): Tiles(Tile(128, 64, 4, 1), Tile(64, 64, 4, 1), Tile(32, 64, 4, 1)),
    ("cdna", "half", 128): Tiles(Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
    ("cdna", "half", 256): Tiles(Tile(32, 32, 4, 1), *_WIDE),
}
"""By class of card, operands, and channels padded to 64, 128 or 256."""

GATED: dict[tuple[Hardware, Numbers, int], Tile] = {
    ("hopper", "half", 64): Tile(128, 64, 8, 3),
    ("hopper", "half", 256): Tile(64, 32, 8, 2),
    ("ampere", "half", 256): Tile(16, 32, 8, 2),
    ("ada", "half", 256): Tile(32, 16, 8, 2),
    ("ampere", "half", 128): Tile(128, 16, 8, 2),
    ("ada", "half", 128): Tile(64, 32, 8, 2),
}
"""Tiles of `attend` for `gated`, where those of the table would spill."""

CANDIDATES: dict[tuple[Numbers, int], dict[str, tuple[Tile, ...]]] = {
    ("half", 64): {
        "attend": (
            Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 4), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3),
            Tile(64, 128, 4, 2), Tile(64, 128, 4, 3), Tile(64, 64, 4, 4), Tile(128, 32, 4, 4),
        ),
        "dq": (
            Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 128, 4, 2),
            Tile(128, 32, 4, 3), Tile(128, 64, 4, 2),
        ),
        "dkv": (
            Tile(64, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(32, 128, 4, 2),
            Tile(32, 128, 8, 3), Tile(128, 64, 4, 2), Tile(64, 128, 4, 2),
        ),
    },
    ("half", 128): {
        "attend": (
            Tile(128, 64, 8, 2), Tile(128, 128, 8, 2), Tile(128, 32, 8, 4), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3),
            Tile(64, 32, 4, 4), Tile(64, 128, 8, 2),
        ),
        "dq": (
            Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(128, 64, 8, 3),
            Tile(128, 128, 8, 1),
        ),
        "dkv": (
            Tile(64, 128, 8, 2), Tile(64, 128, 8, 1), Tile(32, 128, 8, 3), Tile(64, 64, 8, 2), Tile(32, 64, 4, 2),
            Tile(32, 64, 4, 3), Tile(64, 64, 4, 2), Tile(16, 64, 4, 3), Tile(16, 128, 8, 3),
        ),
    },
    ("half", 256): {
        "attend": (
            Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(64, 32, 4, 3), Tile(64, 32, 4, 2),
            Tile(64, 64, 4, 2),
        ),
    },
    ("tf32", 64): {
        "attend": (Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        "dq": (Tile(64, 64, 8, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2)),
        "dkv": (Tile(32, 64, 8, 2), Tile(64, 64, 8, 1), Tile(32, 32, 4, 2)),
    },
    ("tf32", 128): {
        "attend": (Tile(64, 32, 4, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(128, 16, 8, 3)),
    },
}  # fmt: skip
"""By operands and padded channels: what else to try for each kernel, timed by benchmarks/gpu.py on a card at hand."""
