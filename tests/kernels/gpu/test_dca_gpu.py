"""Decoupled cross-attention on a GPU at the sizes it is used at, against the formula in float64.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attention_by_formula import gradients, relative_error
from fedoap.kernels import Precision, decoupled_cross_attention
from fedoap.kernels.dca.problem import Problem

pytestmark = pytest.mark.gpu

Tensors = dict[str, Tensor]
TOKENS = ("q", "k", "v", "bank_k", "bank_v")
TOLERANCE: dict[tuple[torch.dtype, Precision | None], tuple[float, float, float]] = {
    (torch.float32, "ieee"): (2e-6, 5e-6, 1e-5),
    (torch.float32, "tf32x3"): (2e-6, 5e-6, 1e-5),
    # tensor cores cut float32 off instead of rounding it: each operand is 3.5e-4 too small on average
    (torch.float32, "tf32"): (2e-3, 4e-3, 3e-3),
    (torch.float16, None): (1e-3, 2e-3, 1e-5),
    (torch.bfloat16, None): (5e-3, 1e-2, 1e-5),
}
"""Relative error of out and of gradients, absolute error of lse over its largest value or 1."""


@dataclass(frozen=True)
class Case:
    """One call."""

    batch: int
    heads: int
    queries: int
    local: int
    slots: int
    channels: int
    dtype: torch.dtype = torch.bfloat16
    precision: Precision | None = None
    gated: bool = False
    biased: bool = False

    def __str__(self) -> str:
        sizes = f"B{self.batch}H{self.heads}N{self.queries}L{self.local}M{self.slots}D{self.channels}"
        name = f"{sizes}-{str(self.dtype)[6:]}-{'gated' if self.gated else 'joint'}{'-bias' if self.biased else ''}"
        return name if self.precision is None else f"{name}-{self.precision}"


USUAL = Case(8, 8, 256, 256, 512, 128)
LONG = Case(4, 8, 4096, 4096, 2048, 64)
WIDE = Case(8, 1, 256, 256, 512, 1024)
SMALL = Case(3, 2, 77, 50, 131, 64, biased=True)
CASES = [
    USUAL,
    replace(USUAL, gated=True, biased=True),
    replace(USUAL, dtype=torch.float16, biased=True),
    replace(USUAL, dtype=torch.float32, precision="tf32"),
    replace(USUAL, dtype=torch.float32, precision="tf32", gated=True, biased=True),
    replace(USUAL, dtype=torch.float32, precision="tf32x3"),
    LONG,
    WIDE,
    replace(WIDE, gated=True, biased=True),
    replace(USUAL, channels=40),
    replace(USUAL, channels=96, gated=True),
    replace(USUAL, channels=256),
    replace(USUAL, channels=256, gated=True, biased=True),
    replace(SMALL, channels=40, dtype=torch.float32, precision="tf32", gated=True),
    replace(SMALL, channels=256, dtype=torch.float32, precision="tf32"),
    replace(SMALL, channels=20, dtype=torch.float16, gated=True),
    SMALL,
    replace(SMALL, slots=0, biased=False),
    replace(SMALL, local=0),
    replace(SMALL, local=0, gated=True),
    replace(SMALL, queries=1, local=1, slots=1, batch=1),
]


def inputs(case: Case, factor: float = 1.0) -> Tensors:
    """Return random inputs that ask for gradients, tokens as views of (B, N, H, D)."""
    generator = torch.Generator("cuda").manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    def tokens(count: int) -> Tensor:
        made = normal(case.batch, count, case.heads, case.channels).to(case.dtype)
        return made.requires_grad_().transpose(1, 2)

    made = {"q": tokens(case.queries), "k": tokens(case.local), "v": tokens(case.local)}
    made["q"] = (made["q"].detach() * factor).requires_grad_()
    for name in ("bank_k", "bank_v"):
        made[name] = normal(case.heads, case.slots, case.channels).to(case.dtype).requires_grad_()
    if case.biased:
        bias = normal(case.heads, case.slots)
        bias[:, 3::7] = -torch.inf
        made["slot_bias"] = bias.requires_grad_()
    if case.gated:
        # one a query: the gradient of one for a whole head cancels to where its rounding shows
        made["gate"] = normal(case.batch, case.heads, case.queries).requires_grad_()
    return made


def attend(given: Tensors, precision: Precision | None = None) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp by Triton."""
    gate = given.get("gate")
    return decoupled_cross_attention(
        *(given[name] for name in TOKENS), slot_bias=given.get("slot_bias"), gate=gate,
        mode="joint" if gate is None else "gated", return_lse=True, backend="triton", precision=precision,
    )  # fmt: skip


def both_passes(given: Tensors, dout: Tensor, dlse: Tensor | None, precision: Precision | None = None) -> Tensors:
    """Return output, log-sum-exp and gradients."""
    out, lse = attend(given, precision)
    names = list(given)
    outputs, seeds = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    found = torch.autograd.grad(outputs, [given[name] for name in names], seeds)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, found, strict=True))}


def seeds(given: Tensors) -> tuple[Tensor, Tensor]:
    """Return gradients of output and log-sum-exp."""
    out, lse = attend(given)
    generator = torch.Generator("cuda").manual_seed(12)
    dout = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
    return dout, torch.randn(lse.shape, generator=generator, device="cuda")


def expected(case: Case, given: Tensors, dout: Tensor, dlse: Tensor | None) -> Tensors:
    """Return the same in float64, one image at a time: their weights need not exist together."""
    names = {"slot_bias": "bias"}
    rows: list[Tensors] = []
    for b in range(case.batch):
        own = {name: given[name].detach()[b : b + 1] for name in TOKENS[:3]}
        gate = given["gate"].detach()[b : b + 1] if case.gated else None
        problem = Problem(
            **own, bank_k=given["bank_k"].detach(), bank_v=given["bank_v"].detach(),
            bias=given["slot_bias"].detach() if case.biased else None, gate=gate,
            scale=case.channels**-0.5, precision="ieee",
        )  # fmt: skip
        out, lse, found = gradients(problem, dout[b : b + 1], None if dlse is None else dlse.narrow(-3, b, 1))
        rows.append({"out": out, "lse": lse, **found})
    joined = [name for name in ("out", "q", "k", "v", "gate") if name in rows[0]]
    whole: Tensors = {name: torch.cat([row[name] for row in rows]) for name in joined}
    whole["lse"] = torch.cat([row["lse"] for row in rows], dim=-3)
    for name in given.keys() - whole.keys():
        whole[name] = torch.stack([row[names.get(name, name)] for row in rows]).sum(0)
    return whole


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN, so that what no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(got: Tensors, want: Tensors, tolerance: tuple[float, float, float]) -> None:
    """Compare everything."""
    of_out, of_gradients, of_lse = tolerance
    live = want["lse"].isfinite()
    assert torch.equal(got["lse"].isfinite(), live)
    error = (got["lse"].double() - want["lse"])[live].abs()
    assert error.numel() == 0 or error.max() <= of_lse * max(1.0, float(want["lse"][live].abs().max())), "lse"
    for name in want.keys() - {"lse"}:
        assert got[name].isfinite().all(), name
        # where everything cancels, as with one key alone, a relative error says nothing
        scale = max(float(want[name].norm()), 1e-3 * float(got["out"].double().norm()))
        error = (got[name].double() - want[name]).norm()
        assert error <= (of_out if name == "out" else of_gradients) * scale, (name, float(error / scale))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_match_the_formula(case: Case) -> None:
    given = inputs(case)
    dout, dlse = seeds(given)

    with poisoned_memory():
        got = both_passes(given, dout, dlse, case.precision)

    check(got, expected(case, given, dout, dlse), TOLERANCE[case.dtype, case.precision])


@pytest.mark.parametrize("case", [USUAL, replace(USUAL, dtype=torch.float16), LONG, WIDE], ids=str)
def test_errors_are_at_most_one_and_a_half_times_those_of_sdpa(case: Case) -> None:
    given = inputs(case)
    dout, _ = seeds(given)
    want = expected(case, given, dout, None)
    leaves = [given[name] for name in TOKENS]
    bank_k, bank_v = (x.expand(case.batch, *x.shape) for x in leaves[3:])
    out = F.scaled_dot_product_attention(
        leaves[0], torch.cat([leaves[1], bank_k], 2), torch.cat([leaves[2], bank_v], 2)
    )
    theirs = dict(zip(("out", *TOKENS), (out, *torch.autograd.grad(out, leaves, dout)), strict=True))

    got = both_passes(given, dout, None)

    errors = {
        name: (relative_error(got[name], want[name]), relative_error(theirs[name], want[name])) for name in theirs
    }
    assert {name: pair for name, pair in errors.items() if pair[0] > 1.5 * pair[1]} == {}


@pytest.mark.parametrize("case", [USUAL, replace(SMALL, gated=True), WIDE], ids=str)
def test_200_calls_give_the_same_bits(case: Case) -> None:
    given = inputs(case)
    dout, dlse = seeds(given)
    first = both_passes(given, dout, dlse)

    for _ in range(200):
        again = both_passes(given, dout, dlse)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


KEPT = replace(SMALL, channels=512, slots=64, local=30)
"""Weights that are kept for the backward pass."""
ROUTES = [SMALL, replace(SMALL, gated=True), replace(SMALL, channels=512), replace(SMALL, channels=512, gated=True)]


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_extreme_logits_stay_finite(case: Case) -> None:
    given = inputs(case, factor=1e4)
    dout, dlse = seeds(given)

    got, want = both_passes(given, dout, dlse), expected(case, given, dout, dlse)

    assert [name for name, x in got.items() if not x.isfinite().all()] == []
    assert relative_error(got["out"], want["out"]) < 0.02  # float32 logits of 1e5 are 0.01 off
    torch.testing.assert_close(got["lse"].double(), want["lse"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_rows_without_a_live_key_are_zero(case: Case) -> None:
    given = inputs(case)
    given["slot_bias"].data.fill_(-torch.inf)
    given |= {name: given[name].detach()[:, :, :0].requires_grad_() for name in ("k", "v")}
    dout, dlse = seeds(given)

    got = both_passes(given, dout, dlse)

    assert (got.pop("lse") == -torch.inf).all()
    assert [name for name, x in got.items() if x.count_nonzero()] == []


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_gradients_arrive_with_any_strides(case: Case) -> None:
    given = inputs(case)
    dout, _ = seeds(given)
    wide = torch.randn(*dout.shape[:-1], 2 * dout.shape[-1], device="cuda").to(dout.dtype)

    for odd in (dout.new_ones(()).expand(dout.shape), dout[:, :, :1].expand(dout.shape), wide[..., ::2]):
        got, same = both_passes(given, odd, None), both_passes(given, odd.contiguous(), None)
        assert [name for name in got if not torch.equal(got[name], same[name])] == []


@pytest.mark.parametrize("case", [USUAL, replace(SMALL, gated=True), WIDE], ids=str)
def test_both_passes_can_be_captured_in_a_graph(case: Case) -> None:
    # leaves: a graph of autograd that began outside would tie the capture to the default stream
    given = {name: tensor.detach().requires_grad_() for name, tensor in inputs(case).items()}
    dout, dlse = seeds(given)
    expected_bits = both_passes(given, dout, dlse)  # compiles, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes(given, dout, dlse)
    for tensor in captured.values():
        tensor.fill_(torch.nan)

    graph.replay()
    torch.cuda.synchronize()

    assert [name for name in captured if not torch.equal(captured[name], expected_bits[name])] == []


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_no_call_waits_for_the_gpu(case: Case) -> None:
    given = inputs(case)
    dout, dlse = seeds(given)
    both_passes(given, dout, dlse)

    torch.cuda.set_sync_debug_mode("error")
    try:
        both_passes(given, dout, dlse)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
@pytest.mark.parametrize("case", [*ROUTES, KEPT], ids=str)
def test_compiled_by_torch_it_gives_the_same_bits(case: Case) -> None:
    given = inputs(case)
    dout, dlse = seeds(given)
    whole: Callable[[Tensors], tuple[Tensor, Tensor]] = torch.compile(attend, fullgraph=True, dynamic=True)

    out, lse = whole(given)
    found = torch.autograd.grad([out, lse], list(given.values()), [dout, dlse])

    plain = both_passes(given, dout, dlse)
    assert torch.equal(out, plain["out"])
    assert torch.equal(lse, plain["lse"])
    for name, gradient in zip(given, found, strict=True):
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-5, msg=name)


def test_under_autocast_tokens_are_multiplied_in_its_dtype() -> None:
    case = replace(SMALL, dtype=torch.float32)
    given = inputs(case)
    half = {name: x.detach().bfloat16() if name in TOKENS else x.detach() for name, x in given.items()}

    with torch.autocast("cuda", torch.bfloat16):
        out, lse = attend(given)

    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(half)[0])
    assert torch.equal(lse, attend(half)[1])


def test_float32_products_follow_pytorchs_setting() -> None:
    given = inputs(replace(SMALL, dtype=torch.float32))
    precise, fast = attend(given, "tf32x3")[0], attend(given, "tf32")[0]

    by_default = attend(given)[0]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        when_lowered = attend(given)[0]
    finally:
        torch.set_float32_matmul_precision(before)

    assert torch.equal(by_default, precise)
    assert torch.equal(when_lowered, fast)
    assert not torch.equal(precise, fast)


def test_float64_is_left_to_plain_pytorch() -> None:
    x, bank = torch.randn(1, 1, 4, 8, device="cuda").double(), torch.randn(1, 3, 8, device="cuda").double()

    with pytest.warns(UserWarning, match="q is torch.float64; plain PyTorch runs in place of Triton"):
        out = decoupled_cross_attention(x, x, x, bank, bank)

    assert torch.equal(out, decoupled_cross_attention(x, x, x, bank, bank, backend="eager"))
