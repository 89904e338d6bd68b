"""The candidates of the tile tables, as runs that can be compiled or timed.

A candidate differs from the table's entry in the tile of one kernel.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TypeVar

import torch

from benchmarks.competitors.attention import Attention, AttentionShape
from benchmarks.competitors.boundary import Boundary, ImageShape
from benchmarks.gpu_bench.timing import Run
from fedoap.kernels.dca import flash_backward, flash_forward, tiles, wide_backward, wide_forward, wide_tiles
from fedoap.kernels.dca.problem import Attended, Gradients, Precision, Problem, Wanted
from fedoap.kernels.hardware import hardware
from fedoap.kernels.pbl import tiles as boundary_tiles
from fedoap.kernels.pbl.backward import backward as boundary_backward
from fedoap.kernels.pbl.forward import forward as boundary_forward
from fedoap.kernels.pbl.problem import Recipe

BF16, F32 = torch.bfloat16, torch.float32
SMALL = AttentionShape(8, 8, 256, 512, 128)
PAPER = AttentionShape(8, 1, 256, 512, 1024)
FLASH: tuple[tuple[AttentionShape, torch.dtype, Precision], ...] = (
    (AttentionShape(4, 8, 4096, 2048, 64), BF16, "ieee"),
    (SMALL, BF16, "ieee"),
    (replace(SMALL, gated=True), BF16, "ieee"),
    (AttentionShape(8, 4, 256, 512, 256), BF16, "ieee"),
    (SMALL, F32, "tf32"),
)
WIDE: tuple[tuple[AttentionShape, torch.dtype, Precision], ...] = (
    (PAPER, BF16, "ieee"),
    (replace(PAPER, gated=True), BF16, "ieee"),
    (AttentionShape(8, 4, 256, 512, 256), BF16, "ieee"),
    (PAPER, F32, "tf32"),
    (SMALL, F32, "tf32x3"),
)
IMAGES = (
    (ImageShape(64, (512, 512)), F32),
    (ImageShape(16, (256, 256)), F32),
    (ImageShape(2, (160, 160, 160)), F32),
    (ImageShape(64, (512, 512)), BF16),
)
RECIPE = Recipe("both", 1, "square", 0.75, 0.1, 0.1, 1e-5)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One tile for one kernel in one call."""

    case: str
    kernel: str
    tile: str
    is_default: bool
    run: Run
    """Returns the results, as a dataclass or a tensor."""


def candidates(device: torch.device, only: str | None) -> Iterator[list[Candidate]]:
    """Yield what competes with each other: tiles of one kernel for one call, the default first."""
    if only != "pbl":
        for call in FLASH:
            yield from _of_flash(*call, device)
        for call in WIDE:
            yield from _of_wide(*call, device)
    if only != "dca":
        for image, dtype in IMAGES:
            yield from _of_boundary(image, dtype, device)


def _of_flash(
    shape: AttentionShape, dtype: torch.dtype, precision: Precision, device: torch.device
) -> Iterator[list[Candidate]]:
    problem = _problem(shape, dtype, precision, device)
    default, name = tiles.choose(problem), _name(shape, dtype, precision)
    dout, attended = torch.randn_like(problem.q), flash_forward.forward(problem)

    def back(wanted: Wanted, chosen: tiles.Tiles) -> Gradients:
        return flash_backward.backward(problem, attended, dout, None, wanted, chosen)

    of_q, of_keys = (Wanted(q, not q, not q, not q, not q, bias=False, gate=False) for q in (True, False))
    runs: dict[str, Callable[[tiles.Tiles], object]] = {"attend": partial(flash_forward.forward, problem)}
    numbers = tiles.numbers(dtype)
    if shape.d <= tiles.BACKWARD_CHANNELS[numbers]:
        runs |= {"dq": partial(back, of_q), "dkv": partial(back, of_keys)}
    others = tiles.CANDIDATES.get((numbers, max(64, tiles.padded(shape.d))), {})
    for kernel, run in runs.items():
        yield [Candidate(name, f"flash {kernel}", *own) for own in _each(default, kernel, others, run)]


def _of_wide(
    shape: AttentionShape, dtype: torch.dtype, precision: Precision, device: torch.device
) -> Iterator[list[Candidate]]:
    problem = _problem(shape, dtype, precision, device)
    default, name = wide_tiles.tiles_for(problem), _name(shape, dtype, precision)
    dout, attended = torch.randn_like(problem.q), wide_forward.forward(problem)
    wanted = Wanted(q=True, k=True, v=True, bank_k=True, bank_v=True, bias=False, gate=shape.gated)

    def back(chosen: wide_tiles.Tiles) -> Gradients:
        return wide_backward.backward(problem, attended, dout, None, wanted, chosen)

    def forth(chosen: wide_tiles.Tiles) -> Attended:
        return wide_forward.forward(problem, chosen)

    runs = {"scores": forth, "average": forth, "slopes": back, "contract": back}
    others = wide_tiles.CANDIDATES.get(wide_tiles.numbers(dtype, precision), {})
    for kernel, run in runs.items():
        yield [Candidate(name, f"wide {kernel}", *own) for own in _each(default, kernel, others, run)]


def _of_boundary(shape: ImageShape, dtype: torch.dtype, device: torch.device) -> Iterator[list[Candidate]]:
    # where nothing runs, values do not matter and take long to draw
    x = (Boundary.random if device.type == "cuda" else Boundary.blank)(shape, device, dtype)
    z, y, name = x.logits.detach(), x.target, f"{shape} {str(dtype).removeprefix('torch.')}"
    found, one = boundary_forward(z, y, x.seed, RECIPE), torch.ones((), device=device)
    runs: dict[boundary_tiles.Pass, Callable[[boundary_tiles.Tiles], object]] = {
        "forward": partial(boundary_forward, z, y, x.seed, RECIPE),
        "backward": partial(boundary_backward, one, z, y, x.seed, found.sums, found.marks, RECIPE),
    }
    for part, run in runs.items():
        default = boundary_tiles.tiles_for(hardware(device), part)
        own = dict.fromkeys((default, *boundary_tiles.CANDIDATES))
        yield [Candidate(name, f"pbl {part}", _short(tile), tile == default, partial(run, tile)) for tile in own]


def _each(
    default: T, kernel: str, others: Mapping[str, Iterable[object]], run: Callable[[T], object]
) -> Iterator[tuple[str, bool, Run]]:
    """Yield name, whether it is the default, and run of each tile of one kernel; the other kernels keep theirs."""
    first = getattr(default, kernel)
    for tile in dict.fromkeys((first, *others.get(kernel, ()))):
        yield _short(tile), tile == first, partial(run, replace(default, **{kernel: tile}))  # type: ignore[type-var]


def _problem(shape: AttentionShape, dtype: torch.dtype, precision: Precision, device: torch.device) -> Problem:
    x = Attention.random(shape, device, dtype)
    q, k, v, bank_k, bank_v = (t.detach() for t in x.inputs[:5])
    gate = None if x.gate is None else x.gate.detach()[None, :, None].expand(shape.b, shape.h, shape.n)
    return Problem(q, k, v, bank_k, bank_v, None, gate, shape.d**-0.5, precision)


def _name(shape: AttentionShape, dtype: torch.dtype, precision: Precision) -> str:
    return f"{shape} {str(dtype).removeprefix('torch.')}" + (f" {precision}" if dtype == F32 else "")


def _short(tile: object) -> str:
    """Return a tile's numbers: "128x64 w8 s3" and what else it has."""
    values = {field.name: getattr(tile, field.name) for field in fields(tile)}  # type: ignore[arg-type]
    sizes = "x".join(str(value) for name, value in values.items() if name not in ("warps", "stages"))
    stages = f" s{values['stages']}" if "stages" in values else ""
    return f"{sizes} w{values['warps']}{stages}"
