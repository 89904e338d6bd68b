"""How much one program takes, as data: what was fastest, and what else is worth timing.

Sums depend on these figures in their last bits, so they follow the pass and the size of a logit, never
the number of processors: all cards of a class give the same bits.
"""

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from fedoap.kernels.hardware import Hardware

Pass: TypeAlias = Literal["forward", "backward", "extraction"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one program takes at a time, and for how long."""

    lanes: int
    """Groups of 16 bytes of logits in a plane; a power of two."""
    warps: int
    steps: int
    """Planes that a program marches through at most."""


FINALIZE_WARPS = 16
_FINALIZE_VALUES = 1024
_FEWEST_STEPS = 4
_WARPS_WANTED = 132 * 32
"""A march is shortened until this many warps are at work; a constant, so that bits do not depend on the card."""

_TABLE: dict[Pass, Tiles] = {
    "forward": Tiles(lanes=128, warps=4, steps=16),
    "backward": Tiles(lanes=32, warps=1, steps=8),
    "extraction": Tiles(lanes=32, warps=1, steps=16),
}

CANDIDATES: tuple[Tiles, ...] = tuple(
    Tiles(lanes, warps, steps)
    for lanes, warps in ((32, 1), (64, 1), (64, 2), (128, 2), (128, 4), (256, 8))
    for steps in (8, 16, 32)
)


def tiles_for(hardware: Hardware, part: Pass) -> Tiles:
    """Return what a program takes: a group for each thread, of which AMD's warps have 64."""
    tiles = _TABLE[part]
    return replace(tiles, lanes=2 * tiles.lanes) if hardware == "cdna" else tiles


def steps_of(tiles: Tiles, depth: int, groups: int) -> int:
    """Return how many of `depth` planes a program marches through, where the batch has `groups` groups."""
    fitting = groups * tiles.warps // (tiles.lanes * _WARPS_WANTED)
    most = min(max(fitting, _FEWEST_STEPS), tiles.steps, depth)
    marches = -(-depth // most)
    return -(-depth // marches)


def finalize_tile(programs: int) -> tuple[int, int]:
    """Return how many samples and how many programs of each are added at once."""
    columns = min(max(1 << (programs - 1).bit_length(), 16), 1024)
    return _FINALIZE_VALUES // columns, columns
