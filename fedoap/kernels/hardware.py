"""What a GPU can hold: the key of every table of tile sizes.

Tables follow the shared memory that one block may have, not the product's name: cards that hold the
same tiles share an entry. Nothing here asks a driver until a tensor lies on a device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal, TypeAlias

import torch

Hardware: TypeAlias = Literal["hopper", "ampere", "ada", "cdna"]
"""227 KiB of shared memory a block (sm_90, sm_100), 163 KiB (sm_80, sm_87), 99 KiB (all others), or AMD."""

_assumed: ContextVar[Hardware | None] = ContextVar("assumed", default=None)


@contextmanager
def assumed(kind: Hardware) -> Iterator[None]:
    """Let every device count as of this class, as for compiling where there is no GPU."""
    token = _assumed.set(kind)
    try:
        yield
    finally:
        _assumed.reset(token)


def hardware(device: torch.device) -> Hardware:
    """Return the class of a device; a CPU, where kernels are interpreted, counts as the largest."""
    if (kind := _assumed.get()) is not None:
        return kind
    return _of_index(device.index or 0) if device.type == "cuda" else "hopper"


@cache
def _of_index(index: int) -> Hardware:
    if torch.version.hip is not None:
        return "cdna"
    match torch.cuda.get_device_capability(index):
        case (9 | 10, _):
            return "hopper"
        case (8, 0 | 7):
            return "ampere"
        case _:
            return "ada"
