"""The wide route of decoupled cross-attention on a GPU, at real sizes, against the formula in float64.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.
"""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from attention_by_formula import gradients, relative_error
from fedoap.kernels.dca.problem import Attended, Gradients, Precision, Problem, Wanted

pytest.importorskip("triton")

TOLERANCE: dict[tuple[torch.dtype, Precision], tuple[float, float, float]] = {
    (torch.float32, "ieee"): (2e-6, 5e-6, 1e-5),
    (torch.float32, "tf32x3"): (2e-6, 5e-6, 1e-5),
    # tensor cores cut float32 off instead of rounding it: each operand is 3.5e-4 too small on average
    (torch.float32, "tf32"): (2e-3, 4e-3, 3e-3),
    (torch.float16, "ieee"): (1e-3, 2e-3, 1e-5),
    (torch.bfloat16, "ieee"): (5e-3, 1e-2, 1e-5),
}
"""Relative error of out and of gradients, absolute error of lse."""
REAL = pytest.mark.parametrize("channels", [256, 512, 1000, 1024, 2048])
NUMBERS = pytest.mark.parametrize(("dtype", "precision"), TOLERANCE)


def problem(
    channels: int, dtype: torch.dtype, precision: Precision, *, gated: bool = False, batch: int = 4, slots: int = 500
) -> Problem:
    """Return random inputs: 2 heads, 256 queries, 250 local keys; tokens in the memory order of a network's."""
    generator = torch.Generator("cuda").manual_seed(11)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32)

    def tokens(count: int) -> Tensor:
        return random(batch, count, 2, channels).to(dtype).transpose(1, 2)

    q, k, v = tokens(256), tokens(250), tokens(250)
    bias = random(2, slots)
    bias[:, ::3] = -torch.inf
    bank_k, bank_v = random(2, slots, channels).to(dtype), random(2, slots, channels).to(dtype)
    gate = random(batch, 2, 256) if gated else None
    return Problem(q, k, v, bank_k, bank_v, bias, gate, channels**-0.5, precision)


def both_passes(
    of: Problem, ask: Wanted | None = None, *, seeds: tuple[Tensor, Tensor] | None = None
) -> tuple[Attended, Gradients]:
    """Return what both passes give, by default for `upstream`'s gradients of output and log-sum-exp."""
    from fedoap.kernels.dca.wide_backward import backward
    from fedoap.kernels.dca.wide_forward import forward

    attended = forward(of)
    ask = ask or Wanted(q=True, k=True, v=True, bank_k=True, bank_v=True, bias=True, gate=of.gate is not None)
    return attended, backward(of, attended, *(seeds or upstream(of)), ask)


def upstream(of: Problem) -> tuple[Tensor, Tensor]:
    """Return gradients of output and log-sum-exp."""
    generator = torch.Generator("cuda").manual_seed(12)
    batch, heads, queries, _, _, channels = of.sizes
    dout = torch.randn((batch, heads, queries, channels), generator=generator, device="cuda").to(of.q.dtype)
    stacked = (batch, heads, queries) if of.gate is None else (2, batch, heads, queries)
    return dout, torch.randn(stacked, generator=generator, device="cuda")


def check(of: Problem) -> None:
    """Compare everything with the formula."""
    tolerance = TOLERANCE[of.q.dtype, of.precision]
    attended, got = both_passes(of)
    out, lse, expected = gradients(of, *upstream(of))

    assert relative_error(attended.out, out) < tolerance[0], "out"
    torch.testing.assert_close(attended.lse.double(), lse, atol=tolerance[2], rtol=1e-6, msg="lse")
    for name, gradient in expected.items():
        assert relative_error(getattr(got, name), gradient) < tolerance[1], name


def tensors(result: tuple[Attended, Gradients]) -> dict[str, Tensor]:
    """Return all tensors of a result by name, memory for weights excepted."""
    return {
        field.name: tensor
        for record in result
        for field in fields(record)
        if field.name not in ("weights", "pivots") and (tensor := getattr(record, field.name)) is not None
    }


@REAL
@NUMBERS
def test_everything_matches_the_formula(channels: int, dtype: torch.dtype, precision: Precision) -> None:
    check(problem(channels, dtype, precision))


@REAL
@NUMBERS
def test_gated_matches_the_formula(channels: int, dtype: torch.dtype, precision: Precision) -> None:
    check(problem(channels, dtype, precision, gated=True))


@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
@pytest.mark.parametrize("channels", [16, 40, 64, 128])
def test_exact_products_have_few_channels_too(channels: int, precision: Precision) -> None:
    check(problem(channels, torch.float32, precision))


@pytest.mark.parametrize("slots", [0, 1, 127, 129])
@pytest.mark.parametrize("gated", [False, True])
def test_any_number_of_slots_matches_the_formula(slots: int, gated: bool) -> None:
    check(problem(512, torch.bfloat16, "ieee", gated=gated, slots=slots))


@pytest.mark.parametrize("channels", [512, 1024])
def test_repeating_changes_no_bit(channels: int) -> None:
    """Every sum has one order."""
    of = problem(channels, torch.bfloat16, "ieee", gated=True)
    first = tensors(both_passes(of))

    for _ in range(200):
        again = tensors(both_passes(of))
        for name, tensor in first.items():
            assert torch.equal(again[name], tensor), name


@NUMBERS
def test_chunking_changes_no_bit(dtype: torch.dtype, precision: Precision) -> None:
    from fedoap.kernels.dca.wide_backward import backward
    from fedoap.kernels.dca.wide_forward import forward
    from fedoap.kernels.dca.wide_tiles import tiles_for

    of = problem(512, dtype, precision)
    whole = tensors(both_passes(of))
    everything = Wanted(q=True, k=True, v=True, bank_k=True, bank_v=True, bias=True, gate=False)

    for workspace in (4 * 2**20, 2**20, 1):
        tiles = replace(tiles_for(of), workspace=workspace)
        attended = forward(of, tiles)
        part = tensors((attended, backward(of, attended, *upstream(of), everything, tiles)))
        for name, tensor in whole.items():
            assert torch.equal(part[name], tensor), name


def test_both_passes_run_in_a_cuda_graph() -> None:
    of = problem(1024, torch.bfloat16, "ieee")
    seeds = upstream(of)
    eager = tensors(both_passes(of, seeds=seeds))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors(both_passes(of, seeds=seeds))
    graph.replay()
    torch.cuda.synchronize()

    for name, tensor in eager.items():
        assert torch.equal(captured[name], tensor), name


def test_workspace_stays_bounded() -> None:
    """Weights and their gradients would take 2.1 GB at once."""
    of = problem(128, torch.float32, "tf32x3", batch=64, slots=8000)
    both_passes(of)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = both_passes(of)
    kept = sum(tensor.nbytes for tensor in tensors(result).values())

    assert torch.cuda.max_memory_allocated() - before - kept < 200 * 2**20


UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded from one number": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "every second channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("strided", UPSTREAM.values(), ids=UPSTREAM.keys())
def test_a_gradient_may_have_any_strides(strided: Callable[[Tensor], Tensor]) -> None:
    from fedoap.kernels.dca.wide_backward import backward

    of = problem(512, torch.bfloat16, "ieee")
    attended, _ = both_passes(of)
    dout, dlse = upstream(of)
    everything = Wanted(q=True, k=True, v=True, bank_k=True, bank_v=True, bias=True, gate=False)
    plain = tensors((attended, backward(of, attended, strided(dout).contiguous(), dlse, everything)))
    got = tensors((attended, backward(of, attended, strided(dout), dlse, everything)))

    for name, tensor in plain.items():
        assert torch.equal(got[name], tensor), name
