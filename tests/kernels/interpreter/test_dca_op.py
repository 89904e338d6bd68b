"""Decoupled cross-attention as PyTorch's operators, its kernels interpreted.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedoap.kernels import decoupled_cross_attention
from fedoap.kernels.dca import op, tiles
from fedoap.kernels.dca.problem import Problem
from fedoap.kernels.dca.tiles import TABLE, Tile, Tiles

TOKENS = ("q", "k", "v", "bank_k", "bank_v")
SMALL = Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), rows=128)

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TABLE", dict.fromkeys(TABLE, SMALL))


def inputs(
    channels: int = 4, *, gated: bool = False, biased: bool = True, dtype: torch.dtype = torch.float64
) -> Tensors:
    """Return tiny random inputs that ask for gradients."""
    generator = torch.Generator().manual_seed(8)
    shapes: dict[str, tuple[int, ...]] = {
        "q": (2, 1, 3, channels), "k": (2, 1, 2, channels), "v": (2, 1, 2, channels),
        "bank_k": (1, 3, channels), "bank_v": (1, 3, channels),
    }  # fmt: skip
    shapes |= {"slot_bias": (3,)} if biased else {}
    shapes |= {"gate": (1,)} if gated else {}
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    wide = torch.promote_types(dtype, torch.float32)
    return {name: x.to(dtype if name in TOKENS else wide).requires_grad_() for name, x in made.items()}


def attend(given: Tensors, backend: str = "triton") -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp."""
    call: Callable[..., tuple[Tensor, Tensor]] = decoupled_cross_attention
    gate = given.get("gate")
    return call(
        *(given[name] for name in TOKENS), slot_bias=given.get("slot_bias"), gate=gate,
        mode="joint" if gate is None else "gated", return_lse=True, backend=backend, precision="tf32",
    )  # fmt: skip


def arguments(given: Tensors) -> tuple[Tensor | float | str | None, ...]:
    """Return what the forward operator takes."""
    bias = given["slot_bias"].detach().expand(1, 3).requires_grad_() if "slot_bias" in given else None
    gate = given["gate"].detach().view(1, 1, 1).expand(2, 1, 3).requires_grad_() if "gate" in given else None
    return (*(given[name] for name in TOKENS), bias, gate, 0.5, "tf32")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("channels", [4, 130])
def test_both_backends_give_the_same_values_and_gradients(channels: int, gated: bool) -> None:
    """D = 130 goes to the wide route, its weights kept where joint or gated alike."""
    given = inputs(channels, gated=gated)
    results = []
    for backend in ("triton", "eager"):
        out, lse = attend(given, backend)
        total = (out * torch.arange(channels)).sum() + lse.square().sum()
        results.append([out, lse, *torch.autograd.grad(total, list(given.values()))])

    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_match_finite_differences(gated: bool) -> None:
    """Planted bug: lse's gradient added to delta instead of taken from it."""
    given = inputs(gated=gated)

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return attend(dict(zip(given, values, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("gated", [False, True])
def test_the_operators_keep_what_they_declare(gated: bool) -> None:
    """Planted bugs: q's strides declared for k's gradient; lse declared in q's dtype."""
    given = inputs(gated=gated, biased=gated, dtype=torch.float16)
    given["k"] = given["k"].detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    forward = arguments(given)

    torch.library.opcheck(op.dca_forward, forward)

    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in forward)
    saved = list(op.dca_forward(*plain))
    wanted = [True, True, False, True, True, gated, gated]
    torch.library.opcheck(op.dca_backward, (*plain, saved, torch.ones_like(saved[0]), None, wanted))


def test_weights_that_the_wide_route_keeps_are_declared() -> None:
    given = inputs(300, biased=False)

    torch.library.opcheck(op.dca_forward, arguments(given), test_utils=("test_schema", "test_faketensor"))

    assert op.dca_forward(*arguments(given))[4].shape == (2, 1, 3, 256)


def test_a_second_derivative_is_refused() -> None:
    given = inputs()
    (first,) = torch.autograd.grad(attend(given)[0].sum(), given["q"], create_graph=True)

    with pytest.raises(RuntimeError, match="its gradient is differentiated, but has no derivative"):
        torch.autograd.grad(first.sum(), given["q"])


def test_compiled_by_torch_it_gives_the_same_bits() -> None:
    given = inputs()

    out, lse = torch.compile(attend, fullgraph=True, backend="aot_eager")(given)
    found = torch.autograd.grad(out.sum() + lse.sum(), list(given.values()))

    plain = attend(given)
    assert torch.equal(out, plain[0])
    assert torch.equal(lse, plain[1])
    expected = torch.autograd.grad(plain[0].sum() + plain[1].sum(), list(given.values()))
    torch.testing.assert_close(found, expected)


def test_the_environment_chooses_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs()
    calls: list[Problem] = []

    def record(problem: Problem) -> tuple[Tensor, Tensor]:
        calls.append(problem)
        return problem.q, problem.q

    monkeypatch.setattr(op, "attend", record)
    monkeypatch.setenv("FEDOAP_KERNELS", "triton")

    attend(given, "auto")

    assert len(calls) == 1


def test_under_autocast_tokens_are_multiplied_in_its_dtype() -> None:
    given = {name: x.detach() for name, x in inputs(16, dtype=torch.float32).items()}
    rounded = {name: x.bfloat16() if name in TOKENS else x for name, x in given.items()}

    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attend(given)

    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(rounded)[0])
    assert torch.equal(lse, attend(rounded)[1])


@pytest.mark.parametrize("empty", ["images", "queries"])
def test_a_call_without_queries_has_zero_gradients(empty: str) -> None:
    given = inputs()
    for name in TOKENS[:3] if empty == "images" else ("q",):
        whole = given[name].detach()
        given[name] = (whole[:0] if empty == "images" else whole[:, :, :0]).requires_grad_()

    out, lse = attend(given)
    found = torch.autograd.grad(out.sum() + lse.sum(), list(given.values()))

    assert out.numel() == 0
    assert [x.shape for x in found] == [x.shape for x in given.values()]
    assert not any(x.count_nonzero() for x in found)
