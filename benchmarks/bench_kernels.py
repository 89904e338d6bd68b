"""Both kernels against what a user would otherwise run, on a GPU where there is one, else on the CPU.

    python -m pytest benchmarks --benchmark-only

Each competitor's result and gradients are compared with plain float32 before it is timed. Groups are shapes and
passes; `extra_info` holds the least work of the pass, and how near the run came to what this machine can do at most.
benchmarks/gpu.py times more, by turns and as CUDA graphs.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.competitors import attention, boundary
from benchmarks.competitors.attention import AttentionShape
from benchmarks.competitors.boundary import ImageShape
from benchmarks.gpu_bench.contest import PARTS, C, Contest, errors_of, run_of
from benchmarks.gpu_bench.contests import ATTENTION, IMAGES, attention_contest, boundary_contest
from benchmarks.gpu_bench.machine import Ceilings, ceilings, description
from benchmarks.gpu_bench.timing import Run, Stopwatch, stopwatch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SHAPES = ATTENTION if GPU else (*ATTENTION[:2], AttentionShape(1, 8, 1024, 512, 64))
PICTURES = IMAGES if GPU else (ImageShape(16, (256, 256)), ImageShape(2, (64, 64, 64)))
ATTENTIONS = attention.GPU if GPU else attention.CPU
LOSSES = boundary.GPU if GPU else boundary.CPU
pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"),  # by a competitor that cannot run
]


@cache
def watch() -> Stopwatch:
    """Return this device's."""
    return stopwatch(DEVICE)


@cache
def best() -> Ceilings:
    """Return what this machine can do at most, measured once."""
    return ceilings(watch(), quick=True)


@cache
def attention_of(shape: AttentionShape) -> Contest[attention.Attention]:
    """Return the inputs and the exact result of a shape, computed once."""
    return attention_contest(shape, DEVICE, torch.bfloat16 if GPU else torch.float32)


@cache
def boundary_of(shape: ImageShape) -> Contest[boundary.Boundary]:
    """Return the inputs and the exact result of a shape, computed once."""
    return boundary_contest(shape, DEVICE)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(
    benchmark: BenchmarkFixture, taken: dict[str, dict[str, float]], shape: AttentionShape, name: str, part: str
) -> None:
    """Time one part of one competitor whose result is right."""
    _time(benchmark, taken, attention_of(shape), (name, ATTENTIONS[name]), part)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", PICTURES, ids=str)
def test_loss(
    benchmark: BenchmarkFixture, taken: dict[str, dict[str, float]], shape: ImageShape, name: str, part: str
) -> None:
    """Time one part of one competitor; with the same noise all give the same loss."""
    _time(benchmark, taken, boundary_of(shape), (name, LOSSES[name]), part)


def _time(
    benchmark: BenchmarkFixture,
    taken: dict[str, dict[str, float]],
    contest: Contest[C],
    competitor: tuple[str, Callable[[C], Tensor]],
    part: str,
) -> None:
    name, compute = competitor
    try:
        errors = errors_of(contest, name, compute)
    except (RuntimeError, NotImplementedError, ImportError) as error:
        pytest.skip(f"{name} cannot: {str(error).splitlines()[0]}")
    run = run_of(compute, part, contest)
    flops, moved = contest.case.shape.flops(part), contest.bytes(part)
    benchmark.group = f"{contest.name}, {part}"
    benchmark.extra_info |= {"flops": flops, "bytes": moved, "errors": errors, "peak_bytes": watch().peak_bytes(run)}
    benchmark.extra_info |= description(DEVICE)
    rounds, warm = (20, 3) if GPU else (5, 1)
    benchmark.pedantic(_finished(run), rounds=rounds, warmup_rounds=warm)  # type: ignore[no-untyped-call]
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        taken[benchmark.group][name] = seconds
        benchmark.extra_info["roofline_share"] = best().floor_us(flops, moved) / (seconds * 1e6)


def _finished(run: Run) -> Run:
    """Return a run that waits for the device."""

    def wait() -> None:
        run()
        if GPU:
            torch.cuda.synchronize()

    return wait
