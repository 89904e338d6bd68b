"""Which calls the gate compiles: what the product launches for each kind of input it has tables for.

Calls go through the product's own operators and host functions, on a CPU's tensors; see compiling.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fedoap.kernels.dca import op
from fedoap.kernels.dca.problem import Precision, Problem
from fedoap.kernels.hardware import Hardware
from fedoap.kernels.pbl.backward import backward
from fedoap.kernels.pbl.extraction import extract
from fedoap.kernels.pbl.forward import forward
from fedoap.kernels.pbl.problem import Element, Recipe, Region

BATCH, HEADS, QUERIES, SLOTS = 2, 2, 256, 512


@dataclass(frozen=True, slots=True)
class Case:
    """A call to compile the launches of."""

    name: str
    launch: Callable[[], None]


def cases(hardware: Hardware) -> Iterator[Case]:
    """Yield the calls for one class of hardware."""
    yield from _attention_cases(hardware)
    yield from _boundary_cases(hardware)


def _attention_cases(hardware: Hardware) -> Iterator[Case]:
    # on AMD's cards every float32 product is exact
    accurate: Precision = "ieee" if hardware == "cdna" else "tf32x3"
    calls: list[tuple[torch.dtype, int, bool, Precision]] = [
        *((torch.bfloat16, d, gated, "ieee") for d in (64, 128, 256, 1024) for gated in (False, True)),
        (torch.float16, 64, False, "ieee"),
        *((torch.float32, d, False, accurate) for d in (64, 1024)),
    ]
    if hardware != "cdna":
        calls += [(torch.float32, d, False, "tf32") for d in (64, 128, 256, 1024)]
    for dtype, d, gated, precision in calls:
        numbers = str(dtype).removeprefix("torch.") + ("" if dtype.itemsize == 2 else f" {precision}")
        name = f"dca {numbers} D{d} {'gated' if gated else 'joint, bias'}"
        yield Case(name, lambda call=(dtype, d, gated, precision): _attend(*call))  # type: ignore[misc]


def _attend(dtype: torch.dtype, d: int, gated: bool, precision: Precision) -> None:
    local, bank = (BATCH, HEADS, QUERIES, d), (HEADS, SLOTS, d)
    q, k, v, bank_k, bank_v = (
        torch.zeros(s, dtype=dtype, requires_grad=True) for s in (local, local, local, bank, bank)
    )
    bias = None if gated else torch.zeros(HEADS, SLOTS, requires_grad=True)
    gate = torch.zeros(local[:3], requires_grad=True) if gated else None
    out, _ = op.attend(Problem(q, k, v, bank_k, bank_v, bias, gate, d**-0.5, precision))
    inputs = [x for x in (q, k, v, bank_k, bank_v, bias, gate) if x is not None]
    torch.autograd.grad([out], inputs, [torch.zeros_like(out)])


def _boundary_cases(hardware: Hardware) -> Iterator[Case]:
    flat, deep = (2, 1, 256, 256), (1, 1, 32, 64, 64)
    f32, bf16, u8 = torch.float32, torch.bfloat16, torch.uint8
    calls: list[tuple[tuple[int, ...], torch.dtype, torch.dtype, Region, int, Element]] = [
        (flat, f32, u8, "both", 1, "square"),
        (deep, f32, u8, "both", 1, "square"),
        (flat, bf16, u8, "both", 1, "square"),
        (deep, f32, u8, "both", 2, "square"),
    ]
    if hardware == "hopper":
        # one table serves all classes: what differs in constants alone is compiled for one of them
        calls += [
            (flat, f32, u8, "error", 1, "square"),
            (flat, f32, u8, "band", 1, "square"),
            (flat, f32, f32, "both", 1, "square"),
            (deep, bf16, u8, "both", 1, "cross"),
            (flat, f32, u8, "both", 3, "cross"),
        ]
    for shape, dtype, target, region, radius, element in calls:
        name = f"pbl {dtype} {target} {len(shape) - 2}-D {region}, {element} of radius {radius}".replace("torch.", "")
        recipe = Recipe(region, radius, element, 0.75, 0.1, 0.1, 1e-5)
        yield Case(name, lambda call=(shape, dtype, target, recipe): _perturb(*call))  # type: ignore[misc]


def _perturb(shape: tuple[int, ...], dtype: torch.dtype, target: torch.dtype, recipe: Recipe) -> None:
    z, y, seed = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=target), torch.zeros((), dtype=torch.int64)
    found = forward(z, y, seed, recipe)
    backward(torch.ones(()), z, y, seed, found.sums, found.marks, recipe)
    extract(z, y, seed, recipe)
