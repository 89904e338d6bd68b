"""The flash route of decoupled cross-attention, interpreted, against the formula in float64.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head. Tiles are 16 wide, so that
tiny problems take several and end inside of one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_by_formula import GRADIENTS, gradients, relative_error
from fedoap.kernels.dca import flash_backward, flash_gradients
from fedoap.kernels.dca.flash_backward import backward
from fedoap.kernels.dca.flash_forward import forward
from fedoap.kernels.dca.problem import Attended, Gradients, Problem, Wanted
from fedoap.kernels.dca.tiles import Tile, Tiles

TILE = Tile(16, 16, 4, 1)
TILES = Tiles(TILE, TILE, TILE, rows=128)
OTHER_TILES = Tiles(Tile(32, 16, 4, 1), Tile(16, 64, 4, 1), Tile(64, 32, 4, 1), rows=64)
TOLERANCE = {
    torch.float64: (1e-13, 1e-13, 1e-13),
    # tensor cores cut float32 off instead of rounding it: each operand is 3.5e-4 too small on average
    torch.float32: (1.5e-3, 3e-3, 3e-3),
    torch.float16: (1e-3, 2e-3, 1e-5),
    torch.bfloat16: (5e-3, 1e-2, 1e-5),
}
"""Relative error of out and of gradients, absolute error of lse; float32 is multiplied as tf32."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call."""

    batch: int = 2
    heads: int = 2
    queries: int = 20
    local: int = 18
    slots: int = 35
    channels: int = 24
    gated: bool = False
    biased: bool = True


JOINT, GATED = Sizes(), Sizes(gated=True)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN, so that what no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(sizes: Sizes, dtype: torch.dtype = torch.float64, factor: float = 1.0) -> Problem:
    """Return random inputs."""
    generator = torch.Generator().manual_seed(5)
    b, h, n, d = sizes.batch, sizes.heads, sizes.queries, sizes.channels
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(b, h, n, d) * factor, normal(b, h, sizes.local, d), normal(b, h, sizes.local, d)
    bank_k, bank_v = normal(h, sizes.slots, d), normal(h, sizes.slots, d)
    return Problem(
        q.to(dtype), k.to(dtype), v.to(dtype), bank_k.to(dtype), bank_v.to(dtype),
        bias=normal(h, sizes.slots).to(wide) if sizes.biased else None,
        gate=normal(b, h, n).to(wide) if sizes.gated else None,
        scale=d**-0.5, precision="tf32",
    )  # fmt: skip


def seeds(of: Problem) -> tuple[Tensor, Tensor]:
    """Return gradients of output and log-sum-exp."""
    generator = torch.Generator().manual_seed(6)
    dout = torch.randn(of.q.shape, generator=generator, dtype=torch.float64).to(of.q.dtype)
    shape = of.q.shape[:3] if of.gate is None else (2, *of.q.shape[:3])
    return dout, torch.randn(shape, generator=generator, dtype=torch.float64).to(of.wide)


def wanted(of: Problem) -> Wanted:
    """Return all gradients that there are."""
    return Wanted(*(getattr(of, name) is not None for name in GRADIENTS))


def run(
    of: Problem, dout: Tensor, dlse: Tensor | None, tiles: Tiles = TILES, ask: Wanted | None = None
) -> tuple[Attended, Gradients]:
    """Return what both passes give."""
    attended = forward(of, tiles)
    return attended, backward(of, attended, dout, dlse, ask or wanted(of), tiles)


def check(of: Problem, tiles: Tiles = TILES) -> None:
    """Compare everything with the formula."""
    (dout, dlse), (of_out, of_gradients, of_lse) = seeds(of), TOLERANCE[of.q.dtype]
    attended, got = run(of, dout, dlse, tiles)
    out, lse, expected = gradients(of, dout, dlse)
    assert relative_error(attended.out, out) <= of_out
    torch.testing.assert_close(attended.lse.double(), lse, rtol=of_lse, atol=of_lse)
    for name, gradient in expected.items():
        found: Tensor = getattr(got, name)
        assert found.dtype == getattr(of, name).dtype, name
        # where everything cancels, as with one key alone, a relative error says nothing
        difference = torch.linalg.vector_norm(found.double() - gradient)
        assert difference <= of_gradients * (torch.linalg.vector_norm(gradient) + 1e-3), name


@pytest.mark.parametrize(
    "sizes",
    [JOINT, GATED, replace(JOINT, biased=False, channels=16, batch=1), replace(GATED, channels=64, heads=1),
     replace(JOINT, slots=0, biased=False), replace(JOINT, local=0), replace(GATED, local=0, heads=1),
     replace(GATED, slots=0, heads=1), Sizes(1, 1, 1, 1, 1, 1), Sizes(1, 1, 1, 0, 1, 3, gated=True)],
    ids=str,
)  # fmt: skip
def test_values_and_gradients_match_the_formula(sizes: Sizes) -> None:
    """Planted bugs: no mask on the last block of keys, forward or backward; the sums, or the total, of earlier
    blocks not rescaled to a higher pivot; all parts but the first of the bank's gradients dropped.
    """
    check(problem(sizes))


@pytest.mark.parametrize(
    ("dtype", "factor"),
    # tf32 rounds operands once more, and 30 times larger logits with them
    [(torch.float32, 1.0), (torch.float16, 1.0), (torch.float16, 30.0), (torch.bfloat16, 1.0), (torch.bfloat16, 30.0)],
)
def test_errors_stay_within_the_rounding_of_the_operands(dtype: torch.dtype, factor: float) -> None:
    """Planted bug: logits rounded to the operands' dtype."""
    check(problem(replace(GATED, heads=1), dtype, factor))


@settings(deadline=None, max_examples=12)
@given(
    st.builds(
        Sizes, st.integers(1, 3), st.integers(1, 2), st.integers(1, 34), st.integers(0, 33), st.integers(0, 33),
        st.sampled_from([1, 8, 17]), st.booleans(),
    ),
    st.sets(st.integers(0, 33)),
    st.sampled_from(["as they are", "heads inside", "sliced", "expanded"]),
    st.sampled_from([TILES, OTHER_TILES, replace(TILES, programs=1)]),
)  # fmt: skip
def test_any_sizes_strides_and_dead_slots_match_the_formula(
    sizes: Sizes, dead: set[int], layout: str, tiles: Tiles
) -> None:
    """Planted bugs: the strides of k used for v; the image's offset left out of the statistics' address."""
    of = problem(sizes)
    assert of.bias is not None
    for slot in dead & set(range(sizes.slots)):
        of.bias[:, slot] = -torch.inf

    check(laid_out(of, layout), tiles)


def laid_out(of: Problem, layout: str) -> Problem:
    """Return the problem with other strides."""
    match layout:
        case "heads inside":
            tokens = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (of.q, of.k, of.v))
            q, k, v = tokens
            return replace(of, q=q, k=k, v=v, bank_k=of.bank_k.transpose(0, 1).contiguous().transpose(0, 1))
        case "sliced":
            both = torch.cat([of.k, of.v], -1)
            d = of.q.shape[3]
            gate = None if of.gate is None else torch.stack([of.gate, of.gate], -1)[..., 1]
            return replace(of, k=both[..., :d], v=both[..., d:], gate=gate)
        case "expanded":
            assert of.bias is not None
            gate = None if of.gate is None else of.gate[:1, :, :1].expand(of.gate.shape)
            return replace(of, k=of.k[:1].expand(of.k.shape), bias=of.bias[:1].expand(of.bias.shape), gate=gate)
        case _:
            return of


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # weights of padding overflow, in rows of dk and dv never stored
@pytest.mark.parametrize("sizes", [JOINT, GATED])
@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_extreme_logits_of_one_sign_stay_finite(sizes: Sizes, factor: float) -> None:
    """Planted bug: the padding after the last key left with logits of 0, which win over -1e4."""
    of = problem(replace(sizes, heads=1, local=17), torch.float32)
    of = replace(of, q=of.q.abs() * factor, k=of.k.abs(), bank_k=of.bank_k.abs())
    exact = gradients(of, *seeds(of))

    attended, got = run(of, *seeds(of))

    assert relative_error(attended.out, exact[0]) < 0.05
    torch.testing.assert_close(attended.lse.double(), exact[1], rtol=3e-3, atol=0)
    assert all(getattr(got, name).isfinite().all() for name in exact[2])


@pytest.mark.parametrize("sizes", [JOINT, GATED])
def test_rows_without_a_live_key_are_zero(sizes: Sizes) -> None:
    """Planted bug: -inf as the first pivot, so that 2^(-inf - -inf) is NaN."""
    of = problem(replace(sizes, local=0, heads=1))
    assert of.bias is not None
    of.bias.fill_(-torch.inf)

    attended, got = run(of, *seeds(of))

    assert (attended.lse == -torch.inf).all()
    assert not attended.out.count_nonzero()
    for name in GRADIENTS:
        found: Tensor | None = getattr(got, name)
        assert found is None or not found.count_nonzero(), name


def test_gradients_arrive_with_any_strides() -> None:
    """Planted bug: the gradient of out read as if it were laid out like out."""
    of = problem(Sizes(2, 1, 5, 3, 6, 16, gated=True))
    wide = torch.randn(*of.q.shape[:3], 32, dtype=torch.float64)

    for dout in (
        torch.ones((), dtype=torch.float64).expand(of.q.shape),
        wide[:, :, :1, :16].expand(of.q.shape),
        wide[..., ::2],
    ):
        got, same = run(of, dout, None)[1], run(of, dout.contiguous(), None)[1]
        assert [name for name in GRADIENTS if not torch.equal(getattr(got, name), getattr(same, name))] == []


def test_the_same_call_gives_the_same_bits_and_another_split_the_same_to_rounding() -> None:
    """Planted bug: the last part of the batch left out where the batch does not divide evenly."""
    of = problem(Sizes(3, 1, 5, 3, 18, 16), torch.float16)
    parts = [replace(TILES, programs=programs) for programs in (1, 1, 5, 99)]
    assert [tiles.splits(of) for tiles in parts] == [1, 1, 2, 3]

    once, again, two, three = (run(of, *seeds(of), tiles)[1] for tiles in parts)

    for name in ("bank_k", "bank_v", "bias"):
        assert torch.equal(getattr(once, name), getattr(again, name))
        for other in (two, three):
            assert relative_error(getattr(other, name), getattr(once, name).double()) < 1e-3


class Recorded:
    """A kernel that notes the grids it is launched with."""

    def __init__(self, kernel: object) -> None:
        self.kernel, self.grids = kernel, list[tuple[int, ...]]()

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.grids.append(grid)
        return self.kernel[grid]  # type: ignore[index]


@pytest.mark.parametrize(
    ("frozen", "grids"),
    [((), [(2 + 3,)]), (("bank_k", "bank_v", "bias"), [(2,)]), (("k", "v"), [(3,)]),
     (("k", "v", "bank_k", "bank_v", "bias"), [])],
)  # fmt: skip
def test_what_is_frozen_costs_no_program(
    frozen: tuple[str, ...], grids: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = problem(replace(JOINT, batch=1, heads=1))
    recorded = Recorded(flash_gradients.dkv_kernel)
    monkeypatch.setattr(flash_backward, "dkv_kernel", recorded)

    _, got = run(of, *seeds(of), ask=replace(wanted(of), **dict.fromkeys(frozen, False)))

    assert recorded.grids == grids
    assert {name for name in GRADIENTS if getattr(got, name) is None} == {*frozen, "gate"}
