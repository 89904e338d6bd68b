"""The wide route of decoupled cross-attention, interpreted, against the formula in float64.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head. Tiles are 16 wide, so that
tiny problems take several and end inside of one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_by_formula import GRADIENTS, attention, gradients, relative_error
from fedoap.kernels.dca import wide_contract
from fedoap.kernels.dca.problem import Attended, Gradients, Precision, Problem, Wanted
from fedoap.kernels.dca.wide_backward import backward
from fedoap.kernels.dca.wide_forward import forward
from fedoap.kernels.dca.wide_tiles import Tile, Tiles

TILE = Tile(16, 16, 16, 4, 1)
TILES = Tiles(TILE, TILE, TILE, TILE, block=16)
OTHER_TILES = Tiles(
    scores=Tile(16, 64, 16, 4, 1),
    average=Tile(32, 16, 32, 4, 1),
    slopes=Tile(32, 32, 16, 4, 1),
    contract=Tile(32, 16, 64, 4, 1),
    block=64,
)
FLOAT64_ERROR = 1e-13
TOLERANCE: dict[tuple[torch.dtype, Precision], tuple[float, float, float]] = {
    (torch.float32, "ieee"): (2e-6, 5e-6, 1e-5),
    (torch.float32, "tf32x3"): (2e-6, 5e-6, 1e-5),
    # tensor cores cut float32 off instead of rounding it: each operand is 3.5e-4 too small on average
    (torch.float32, "tf32"): (1.5e-3, 3e-3, 3e-3),
    (torch.float16, "ieee"): (1e-3, 2e-3, 1e-5),
    (torch.bfloat16, "ieee"): (5e-3, 1e-2, 1e-5),
}
"""Relative error of out and of gradients, absolute error of lse."""
EVERYTHING = Wanted(q=True, k=True, v=True, bank_k=True, bank_v=True, bias=True, gate=True)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call; gated, with a bias."""

    batch: int = 2
    heads: int = 2
    queries: int = 17
    local: int = 5
    slots: int = 18
    channels: int = 24
    gated: bool = False
    biased: bool = True


JOINT, GATED = Sizes(), Sizes(heads=1, gated=True)
SAVED, SAVED_GATED = Sizes(2, 1, 17, 3, 5, 40), Sizes(2, 1, 17, 3, 5, 40, gated=True)
"""Weights (B, H, N, 32) that are smaller than q and hence kept."""


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return normal float64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    sizes: Sizes, dtype: torch.dtype = torch.float64, precision: Precision = "ieee", factor: float = 1.0
) -> Problem:
    """Return random inputs."""
    b, h, n, d = sizes.batch, sizes.heads, sizes.queries, sizes.channels
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = random(b, h, n, d, seed=1), random(b, h, sizes.local, d, seed=2), random(b, h, sizes.local, d, seed=3)
    bank_k, bank_v = random(h, sizes.slots, d, seed=4), random(h, sizes.slots, d, seed=5)
    q, k, v, bank_k, bank_v = ((x * factor).to(dtype) for x in (q, k, v, bank_k, bank_v))
    return Problem(
        q, k, v, bank_k, bank_v,
        bias=random(h, sizes.slots, seed=6).to(wide) if sizes.biased else None,
        gate=random(b, h, n, seed=7).to(wide) if sizes.gated else None,
        scale=d**-0.5,
        precision=precision,
    )  # fmt: skip


def with_tensors(of: Problem, tensors: dict[str, Tensor]) -> Problem:
    """Return the problem with some of its tensors replaced."""
    had: dict[str, Tensor | None] = {name: getattr(of, name) for name in GRADIENTS}
    given = had | tensors
    q, k, v, bank_k, bank_v = (x for name in GRADIENTS[:5] if (x := given[name]) is not None)
    return Problem(q, k, v, bank_k, bank_v, given["bias"], given["gate"], of.scale, of.precision)


def doubled(of: Problem) -> Problem:
    """Return the problem in float64."""
    return with_tensors(of, {name: x.double() for name in GRADIENTS if (x := getattr(of, name)) is not None})


def wanted(of: Problem) -> Wanted:
    """Return all gradients that there are."""
    return replace(EVERYTHING, bias=of.bias is not None, gate=of.gate is not None)


def run(
    of: Problem, dout: Tensor, dlse: Tensor | None = None, tiles: Tiles = TILES, ask: Wanted | None = None
) -> tuple[Attended, Gradients]:
    """Return what both passes give."""
    attended = forward(of, tiles)
    return attended, backward(of, attended, dout, dlse, ask or wanted(of), tiles)


def check(
    of: Problem, dout: Tensor, dlse: Tensor | None, tolerance: tuple[float, float, float], tiles: Tiles = TILES
) -> None:
    """Compare everything with the formula."""
    attended, got = run(of, dout, dlse, tiles)
    out, lse, expected = gradients(of, dout, dlse)

    assert relative_error(attended.out, out) < tolerance[0], "out"
    assert attended.lse.dtype == of.wide
    torch.testing.assert_close(attended.lse.double(), lse, atol=tolerance[2], rtol=tolerance[0], msg="lse")
    for name, gradient in expected.items():
        found = getattr(got, name)
        assert found.shape == gradient.shape, name
        assert found.dtype == getattr(of, name).dtype, name
        assert relative_error(found, gradient) < tolerance[1], name


def assert_same(one: tuple[Attended, Gradients], other: tuple[Attended, Gradients]) -> None:
    """Compare bits."""
    assert torch.equal(one[0].out, other[0].out)
    assert torch.equal(one[0].lse, other[0].lse)
    for name in GRADIENTS:
        a, b = getattr(one[1], name), getattr(other[1], name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


def upstream(of: Problem) -> tuple[Tensor, Tensor]:
    """Return gradients of output and log-sum-exp."""
    batch, heads, queries, _, _, channels = of.sizes
    stacked = (batch, heads, queries) if of.gate is None else (2, batch, heads, queries)
    return random(batch, heads, queries, channels, seed=8).to(of.q.dtype), random(*stacked, seed=9).to(of.wide)


@pytest.mark.parametrize("tiles", [TILES, OTHER_TILES], ids=["small", "uneven"])
@pytest.mark.parametrize("sizes", [JOINT, GATED, SAVED, SAVED_GATED], ids=str)
def test_everything_matches_the_formula(sizes: Sizes, tiles: Tiles) -> None:
    """Planted bugs: padding of the last key tile weighs 2^s; tiles averaged without their pivots; last batch lost."""
    of = problem(sizes)

    check(of, *upstream(of), (FLOAT64_ERROR,) * 3, tiles)


@settings(deadline=None, max_examples=8)
@given(
    st.builds(
        Sizes, st.integers(1, 3), st.integers(1, 2), st.integers(0, 20), st.integers(0, 20), st.integers(0, 20),
        st.sampled_from([1, 7, 16, 24, 50]), st.booleans(), st.booleans(),
    ),
    st.sets(st.integers(0, 19)),
    st.booleans(),
)  # fmt: skip
def test_any_sizes_match_the_formula(sizes: Sizes, dead: set[int], all_dead: bool) -> None:
    """Any number of keys, none included, and any slots dead. Planted bug: the last batch element left out."""
    of = problem(sizes)
    if of.bias is not None:
        of.bias[:, [slot for slot in range(sizes.slots) if slot in dead or all_dead]] = -torch.inf

    check(of, *upstream(of), (FLOAT64_ERROR,) * 3)


@pytest.mark.parametrize("sizes", [JOINT, SAVED_GATED], ids=str)
@pytest.mark.parametrize(("dtype", "precision"), TOLERANCE)
def test_each_precision_keeps_its_tolerance(sizes: Sizes, dtype: torch.dtype, precision: Precision) -> None:
    of = problem(sizes, dtype, precision)

    check(of, *upstream(of), TOLERANCE[dtype, precision])


@pytest.mark.parametrize(("dtype", "precision"), [key for key in TOLERANCE if key[1] != "tf32"])
def test_exact_products_keep_their_tolerance_on_large_inputs(dtype: torch.dtype, precision: Precision) -> None:
    """Logits of some 1000: an error of a logit is one of the weights."""
    of = problem(SAVED_GATED, dtype, precision, factor=30.0)
    attended = forward(of, TILES)
    out, lse = attention(doubled(of))

    assert relative_error(attended.out, out) < max(TOLERANCE[dtype, precision][0], 1e-4)
    torch.testing.assert_close(attended.lse.double(), lse, atol=0, rtol=TOLERANCE[dtype, precision][2])


@pytest.mark.parametrize("sizes", [Sizes(1, 2, 5, 3, 4, 3), Sizes(2, 1, 3, 2, 2, 33, gated=True)], ids=str)
def test_gradients_are_those_of_finite_differences(sizes: Sizes) -> None:
    of = problem(sizes)
    names = [name for name in GRADIENTS if getattr(of, name) is not None]

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx: "Attend", *inputs: Tensor) -> tuple[Tensor, Tensor]:
            ctx.of = with_tensors(of, dict(zip(names, inputs, strict=True)))
            ctx.attended = forward(ctx.of, TILES)
            return ctx.attended.out, ctx.attended.lse

        @staticmethod
        def backward(ctx: "Attend", dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
            got = backward(ctx.of, ctx.attended, dout, dlse, wanted(of), TILES)
            return tuple(getattr(got, name) for name in names)

        of: Problem
        attended: Attended

    leaves = [getattr(of, name).requires_grad_() for name in names]

    assert torch.autograd.gradcheck(Attend.apply, leaves, fast_mode=True)


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let new memory hold NaN; yield the sizes asked for, in bytes."""
    sizes: list[int] = []
    makers = (torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fill(*arguments: object, **options: object) -> Tensor:
            tensor = make(*arguments, **options)
            sizes.append(tensor.nbytes)
            return tensor.fill_(torch.nan)

        return fill

    for owner, name in makers:
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
    yield sizes
    monkeypatch.undo()


@pytest.mark.parametrize("workspace", [32 * 2**20, 15_000, 1], ids=["whole", "by head", "by rows"])
@pytest.mark.parametrize("sizes", [JOINT, SAVED_GATED], ids=str)
def test_no_memory_is_read_before_it_is_written(sizes: Sizes, workspace: int, nan_memory: list[int]) -> None:
    of = problem(sizes)

    check(of, *upstream(of), (FLOAT64_ERROR,) * 3, replace(TILES, workspace=workspace))


@pytest.mark.parametrize("gated", [False, True])
def test_rows_without_a_live_key_give_zero_and_zero_gradients(gated: bool) -> None:
    of = problem(Sizes(local=0, gated=gated))
    assert of.bias is not None
    of.bias.fill_(-torch.inf)

    attended, got = run(of, *upstream(of))

    assert not attended.out.any()
    assert bool((attended.lse == -torch.inf).all())
    for name in GRADIENTS:
        assert getattr(got, name) is None or not getattr(got, name).any(), name


@pytest.mark.parametrize("factor", [1e4, -1e4])
@pytest.mark.parametrize("sizes", [JOINT, GATED, SAVED], ids=str)
def test_extreme_logits_stay_finite_and_right(sizes: Sizes, factor: float) -> None:
    of = problem(sizes)
    of.q.mul_(factor)

    check(of, *upstream(of), (1e-10, 1e-8, 1e-8))


def test_identical_keys_share_the_weight() -> None:
    of = problem(replace(JOINT, biased=False))
    same = replace(of, k=of.k[:, :, :1].expand_as(of.k), bank_k=torch.zeros_like(of.bank_k))

    check(same, *upstream(same), (FLOAT64_ERROR,) * 3)


UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded from one number": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "expanded over queries": lambda x: x[:, :, :1].expand_as(x),
    "every second channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "cut from a larger tensor": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("strided", UPSTREAM.values(), ids=UPSTREAM.keys())
def test_a_gradient_may_have_any_strides(strided: Callable[[Tensor], Tensor]) -> None:
    of = problem(GATED)
    dout, dlse = upstream(of)
    stacked = torch.stack([dlse, dlse], -1)[..., 0]

    assert_same(run(of, strided(dout), stacked), run(of, strided(dout).contiguous(), dlse))


@pytest.mark.parametrize("sizes", [JOINT, SAVED_GATED], ids=str)
def test_inputs_may_be_views_in_the_memory_order_of_tokens(sizes: Sizes) -> None:
    """(B, N, H, D) in memory; results keep that order, so that a network's next view of them costs nothing."""
    of = problem(sizes)

    def swapped(x: Tensor, one: int, other: int) -> Tensor:
        return x.transpose(one, other).contiguous().transpose(one, other)

    axes = {"q": (1, 2), "k": (1, 2), "v": (1, 2), "bank_k": (0, 1), "bank_v": (0, 1), "bias": (0, 1), "gate": (1, 2)}
    views = with_tensors(
        of, {name: swapped(getattr(of, name), *axes[name]) for name in axes if getattr(of, name) is not None}
    )
    dout, dlse = upstream(of)
    result = run(views, dout, dlse)

    assert_same(result, run(of, dout, dlse))
    assert result[0].out.stride() == views.q.stride()
    for name in ("q", "k", "v"):
        assert getattr(result[1], name).stride() == getattr(views, name).stride(), name


def test_inputs_may_be_expanded() -> None:
    of = problem(Sizes(2, 2, 5, 6, 7, 16, gated=True))
    assert of.bias is not None
    assert of.gate is not None
    expanded = replace(
        of,
        q=of.q[:, :, :1].expand_as(of.q),
        k=of.k[:1].expand_as(of.k),
        v=of.v[:, :1].expand_as(of.v),
        bank_k=of.bank_k[:1].expand_as(of.bank_k),
        bias=of.bias[:1].expand_as(of.bias),
        gate=of.gate[:1, :, :1].expand_as(of.gate),
    )

    check(expanded, *upstream(of), (FLOAT64_ERROR,) * 3)


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [(torch.float32, Sizes(2, 2, 33, 3, 9, 16)), (torch.bfloat16, Sizes(3, 1, 17, 5, 9, 33, gated=True))],
    ids=str,
)
def test_chunking_changes_no_bit(sizes: Sizes, dtype: torch.dtype) -> None:
    """Nor does repeating. Planted bugs: a sum started anew in each chunk; bank sums ended with the first one."""
    of = problem(sizes, dtype)
    whole = run(of, *upstream(of))

    for workspace in (32 * 2**20, 9_000, 1):
        assert_same(run(of, *upstream(of), replace(TILES, workspace=workspace)), whole)


def test_workspace_stays_within_its_limit(nan_memory: list[int]) -> None:
    of = problem(Sizes(2, 2, 32, 10, 20, 16, biased=False), torch.float32)
    row_bytes = TILES.width(10, 20) * 4

    run(of, *upstream(of), replace(TILES, workspace=48 * row_bytes))

    assert max(nan_memory) <= max(48 * row_bytes, of.q.nbytes)


@dataclass
class CountedLaunches:
    """A kernel that remembers its grids."""

    kernel: dict[tuple[int, ...], Callable[..., None]]
    programs: list[int]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.programs.append(grid[0])
        return self.kernel[grid]


@pytest.mark.parametrize("of_local", [True, False])
def test_a_frozen_bank_launches_no_program_for_it(of_local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    of = problem(Sizes(1, 1, 16, 16, 64, 16))
    counted = CountedLaunches(wide_contract.contract_kernel, [])
    monkeypatch.setattr(wide_contract, "contract_kernel", counted)
    everything = run(of, *upstream(of))[1]
    frozen = replace(EVERYTHING, bank_k=False, bank_v=False, bias=False, gate=False, k=of_local, v=of_local)

    got = run(of, *upstream(of), ask=frozen)[1]

    assert counted.programs == [4 + 4 + 1 + 1 + 1, 1 + 2 * of_local]
    assert got.bank_k is None
    assert got.bank_v is None
    assert got.bias is None
    assert got.q is not None
    assert everything.q is not None
    assert torch.equal(got.q, everything.q)


@pytest.mark.parametrize("name", GRADIENTS)
def test_each_gradient_can_be_had_alone(name: str) -> None:
    of = problem(GATED)
    nothing = Wanted(*[False] * 7)

    alone = run(of, *upstream(of), ask=replace(nothing, **{name: True}))[1]
    everything = run(of, *upstream(of))[1]

    assert torch.equal(getattr(alone, name), getattr(everything, name))
    assert [other for other in GRADIENTS if getattr(alone, other) is not None] == [name]
