"""Decoupled cross-attention against float64 arithmetic written out by hand.

B batch, H heads, N queries, L local keys, M slots, D channels.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fedoap.kernels import decoupled_cross_attention

Array = NDArray[np.float64]
OPERANDS = ("q", "k", "v", "bank_k", "bank_v")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call."""

    batch: int = 2
    heads: int = 2
    queries: int = 5
    local: int = 4
    slots: int = 6
    channels: int = 3


def operands(sizes: Sizes, dtype: torch.dtype = torch.float64, factor: float = 1.0) -> dict[str, Tensor]:
    """Return random inputs that ask for gradients."""
    generator = torch.Generator().manual_seed(3)
    b, h, d = sizes.batch, sizes.heads, sizes.channels
    shapes = {
        "q": (b, h, sizes.queries, d),
        "k": (b, h, sizes.local, d),
        "v": (b, h, sizes.local, d),
        "bank_k": (h, sizes.slots, d),
        "bank_v": (h, sizes.slots, d),
        "slot_bias": (h, sizes.slots),
    }
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    made["q"] *= factor
    return {
        name: tensor.to(dtype if name in OPERANDS else torch.promote_types(dtype, torch.float32)).requires_grad_()
        for name, tensor in made.items()
    }


def attend(inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of the operation."""
    gate = inputs.get("gate")
    return decoupled_cross_attention(
        *(inputs[name] for name in OPERANDS),
        slot_bias=inputs["slot_bias"],
        gate=gate,
        mode="joint" if gate is None else "gated",
        return_lse=True,
    )


def by_hand(inputs: dict[str, Tensor]) -> tuple[Array, Array]:
    """Return output and log-sum-exp, one query and one key at a time, in float64."""
    q, k, v, bank_k, bank_v, bias = (inputs[name].detach().double().numpy() for name in (*OPERANDS, "slot_bias"))
    gate = inputs["gate"].detach().double().numpy() if "gate" in inputs else None
    out, lse = np.zeros(q.shape), np.zeros((2, *q.shape[:-1]))
    for b, h, n in np.ndindex(q.shape[:-1]):
        row = q[b, h, n] / math.sqrt(q.shape[-1])
        local = [(float(row @ key), value) for key, value in zip(k[b, h], v[b, h], strict=True)]
        slots = [(float(row @ bank_k[h, m]) + bias[h, m], bank_v[h, m]) for m in range(bank_k.shape[1])]
        if gate is None:
            out[b, h, n], lse[0, b, h, n] = _weighted(local + slots, q.shape[-1])
        else:
            first, lse[0, b, h, n] = _weighted(local, q.shape[-1])
            second, lse[1, b, h, n] = _weighted(slots, q.shape[-1])
            out[b, h, n] = first + gate[h] * second
    return out, lse[0] if gate is None else lse


def _weighted(pairs: list[tuple[float, Array]], channels: int) -> tuple[Array, float]:
    live = [(logit, value) for logit, value in pairs if logit > -math.inf]
    if not live:
        return np.zeros(channels), -math.inf
    top = max(logit for logit, _ in live)
    total = math.fsum(math.exp(logit - top) for logit, _ in live)
    mean = sum((math.exp(logit - top) / total * value for logit, value in live), np.zeros(channels))
    return mean, top + math.log(total)


def gradients_by_hand(inputs: dict[str, Tensor], dout: Tensor, dlse: Tensor) -> dict[str, Array]:
    """Return the gradients of sum(out * dout) + sum(lse * dlse) for `joint`: dS = P (dP - delta + dlse)."""
    q, k, v, bank_k, bank_v, bias = (inputs[name].detach().double().numpy() for name in (*OPERANDS, "slot_bias"))
    scale, length = 1 / math.sqrt(q.shape[-1]), k.shape[2]
    logits = np.concatenate(
        [np.einsum("bhnd,bhld->bhnl", q, k) * scale, np.einsum("bhnd,hmd->bhnm", q, bank_k) * scale + bias[:, None]], -1
    )
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    g = dout.double().numpy()
    dp = np.concatenate([np.einsum("bhnd,bhld->bhnl", g, v), np.einsum("bhnd,hmd->bhnm", g, bank_v)], -1)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + dlse.double().numpy()[..., None])
    local, bank = ds[..., :length], ds[..., length:]
    return {
        "q": scale * (np.einsum("bhnl,bhld->bhnd", local, k) + np.einsum("bhnm,hmd->bhnd", bank, bank_k)),
        "k": scale * np.einsum("bhnl,bhnd->bhld", local, q),
        "v": np.einsum("bhnl,bhnd->bhld", p[..., :length], g),
        "bank_k": scale * np.einsum("bhnm,bhnd->hmd", bank, q),
        "bank_v": np.einsum("bhnm,bhnd->hmd", p[..., length:], g),
        "slot_bias": bank.sum((0, 2)),
    }


def relative_error(got: Tensor, expected: Array) -> float:
    """Return the root of the mean squared error over that of the expected values."""
    difference = got.detach().double().numpy() - expected
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-30))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 4e-6)])
@settings(deadline=None, max_examples=30)
@given(
    st.builds(
        Sizes, st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 5), st.integers(0, 5),
        st.sampled_from([1, 2, 5]),
    ),
    st.booleans(),
    st.sets(st.integers(0, 4)),
)  # fmt: skip
def test_output_and_log_sum_exp_match_arithmetic_by_hand(
    dtype: torch.dtype, atol: float, sizes: Sizes, gated: bool, dead: set[int]
) -> None:
    """Any sizes, none included, any slots dead; in float32 by PyTorch's fused attention.

    Planted bugs: heads' biases swapped, no scale, gate on both parts; where fused, a dead bank's log-sum-exp as the
    kernel gives it, the two parts' weights swapped.
    """
    inputs = operands(sizes, dtype)
    for slot in dead & set(range(sizes.slots)):
        inputs["slot_bias"].data[:, slot] = -torch.inf
    if gated:
        inputs["gate"] = torch.linspace(-0.5, 1.0, sizes.heads, dtype=dtype)

    with torch.no_grad():
        out, lse = attend(inputs)
    expected_out, expected_lse = by_hand(inputs)

    np.testing.assert_allclose(out.numpy(), expected_out, atol=atol)
    np.testing.assert_allclose(lse.numpy(), expected_lse, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_values_and_gradients_stay_within_rounding(dtype: torch.dtype, factor: float) -> None:
    """Planted bug: sums in the inputs' half precision (out of tolerance for bfloat16)."""
    inputs = operands(Sizes(2, 2, 33, 20, 17, 16), dtype, factor)
    generator = torch.Generator().manual_seed(4)
    dout = torch.randn(inputs["q"].shape, generator=generator).to(dtype)
    dlse = torch.randn(inputs["q"].shape[:-1], generator=generator)

    out, lse = attend(inputs)
    torch.autograd.backward([out, lse], [dout, dlse])

    expected_out, expected_lse = by_hand(inputs)
    assert out.dtype == dtype
    assert relative_error(out, expected_out) < TOLERANCE[dtype]
    np.testing.assert_allclose(lse.detach().numpy(), expected_lse, rtol=1e-6, atol=1e-5)
    for name, expected in gradients_by_hand(inputs, dout, dlse).items():
        gradient = inputs[name].grad
        assert gradient is not None
        assert relative_error(gradient, expected) < GRADIENT_TOLERANCE[dtype], name
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_agree_with_differences(gated: bool) -> None:
    """Planted bug: the log-sum-exp detached."""
    inputs = operands(Sizes(2, 2, 3, 2, 3, 2))
    inputs["slot_bias"].data[0, 1] = -torch.inf
    if gated:
        inputs["gate"] = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    names = [name for name in inputs if name != "slot_bias"]

    def function(*tensors: Tensor) -> Tensor:
        out, lse = attend({**inputs, **dict(zip(names, tensors, strict=True))})
        return out + (lse.sum(0) if gated else lse)[..., None]

    assert torch.autograd.gradcheck(function, tuple(inputs[name] for name in names))


def test_slot_bias_and_gate_get_their_gradients_by_differences() -> None:
    inputs = operands(Sizes(2, 2, 3, 2, 3, 2))
    gate = torch.rand(2, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(bias: Tensor, gate: Tensor) -> Tensor:
        return attend({**inputs, "slot_bias": bias, "gate": gate})[0]

    assert torch.autograd.gradcheck(function, (inputs["slot_bias"], gate))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 3))
def test_centroids_with_log_counts_stand_for_all_their_tokens(counts: list[int], local: int) -> None:
    """Attention over M centroids with log n equals that over all tokens where those of a slot coincide.

    Planted bug: bias applied before the scale of the products (log n / sqrt(D)).
    """
    inputs = operands(Sizes(local=local, slots=len(counts)))
    repeats = torch.tensor(counts)
    tokens = {
        **inputs,
        "bank_k": inputs["bank_k"].repeat_interleave(repeats, 1),
        "bank_v": inputs["bank_v"].repeat_interleave(repeats, 1),
        "slot_bias": torch.zeros(2, int(repeats.sum())),
    }

    out, lse = attend({**inputs, "slot_bias": torch.log(repeats.double())})

    torch.testing.assert_close(out, attend(tokens)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, attend(tokens)[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [Sizes(local=0), Sizes(local=0, slots=0)])
def test_a_row_without_any_live_key_is_zero_and_has_zero_gradients(sizes: Sizes) -> None:
    """Planted bug: pivot of -inf left in, so that exp(-inf - -inf) is NaN."""
    inputs = operands(sizes)
    inputs["slot_bias"].data.fill_(-torch.inf)

    out, lse = attend(inputs)
    torch.autograd.backward([out.sum() + torch.where(lse.isinf(), 0.0, lse).sum()])

    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    for name in inputs:
        assert torch.equal(inputs[name].grad, torch.zeros_like(inputs[name])), name  # type: ignore[arg-type]


def test_a_gated_bank_of_dead_slots_adds_nothing() -> None:
    inputs = operands(Sizes())
    inputs["slot_bias"].data.fill_(-torch.inf)
    inputs["gate"] = torch.ones(2, dtype=torch.float64, requires_grad=True)

    out, lse = attend(inputs)
    torch.autograd.backward([out.sum()])
    alone = attend({**inputs, "bank_k": inputs["bank_k"][:, :0], "bank_v": inputs["bank_v"][:, :0],
                    "slot_bias": inputs["slot_bias"][:, :0]})  # fmt: skip

    assert torch.equal(out, alone[0])
    assert (lse[1] == -torch.inf).all()
    assert inputs["gate"].grad is not None
    assert (inputs["gate"].grad == 0).all()


def test_an_empty_bank_gives_plain_attention() -> None:
    inputs = operands(Sizes(slots=0))

    out, _ = attend(inputs)

    plain = torch.nn.functional.scaled_dot_product_attention(inputs["q"], inputs["k"], inputs["v"])
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-14)


def test_tokens_without_channels_weigh_all_keys_alike() -> None:
    """Planted bug: the scale 1 / sqrt(D), which divides by 0."""
    out, lse = attend(operands(Sizes(channels=0)) | {"slot_bias": torch.zeros(2, 6)})

    assert out.shape == (2, 2, 5, 0)
    torch.testing.assert_close(lse, torch.full((2, 2, 5), math.log(10), dtype=torch.float64))


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_huge_logits_stay_finite(shift: float) -> None:
    inputs = operands(Sizes(local=0), torch.float32)
    inputs["slot_bias"].data += shift

    out, lse = attend(inputs)

    expected_out, expected_lse = by_hand(inputs)
    assert relative_error(out, expected_out) < 1e-3  # the shift itself costs 1e4 * 2**-24 of each logit
    np.testing.assert_allclose(lse.detach().numpy(), expected_lse, rtol=1e-6)


def test_the_output_keeps_the_order_of_the_queries_strides() -> None:
    inputs = {name: tensor.detach() for name, tensor in operands(Sizes()).items()}
    inputs["q"] = torch.randn(2, 5, 2, 3, dtype=torch.float64).transpose(1, 2)

    out, _ = attend(inputs)

    assert out.stride() == inputs["q"].stride()


def test_gradients_of_any_stride_are_taken() -> None:
    inputs, twin = operands(Sizes()), operands(Sizes())

    torch.autograd.backward([attend(inputs)[0].sum()])  # an expanded gradient: all strides 0
    torch.autograd.backward([attend(twin)[0]], [torch.ones(2, 2, 5, 6, dtype=torch.float64)[..., ::2]])

    for name in inputs:
        torch.testing.assert_close(inputs[name].grad, twin[name].grad)


def test_the_bank_is_not_expanded_over_the_batch() -> None:
    """The largest sum of allocations of one kind; a bank copied 64 times would be 128 MiB.

    Planted bug: torch.matmul in place of the product with the batch folded into the rows.
    """
    q = torch.randn(64, 2, 1, 256)
    k = torch.randn(64, 2, 1, 256)
    bank = torch.randn(2, 1024, 256)  # 2 MiB

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        decoupled_cross_attention(q, k, k, bank, bank)

    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < 8 * 2**20


def test_under_autocast_tokens_are_cast_and_bias_is_not() -> None:
    inputs = {name: tensor.detach() for name, tensor in operands(Sizes(), torch.float32).items()}

    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attend(inputs)

    rounded = {name: tensor.bfloat16() if name in OPERANDS else tensor for name, tensor in inputs.items()}
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(rounded)[0])
    assert torch.equal(lse, attend(rounded)[1])


def test_a_frozen_bank_takes_no_gradient() -> None:
    inputs = operands(Sizes())
    for name in ("bank_k", "bank_v", "slot_bias"):
        inputs[name].requires_grad_(False)

    torch.autograd.backward([attend(inputs)[0].sum()])

    assert inputs["bank_k"].grad is None
    assert inputs["q"].grad is not None


BAD = [
    ({"q": torch.zeros(2, 5, 3)}, "q has shape"),
    ({"q": torch.zeros(2, 2, 5, 3, dtype=torch.int64)}, "q is torch.int64"),
    ({"k": torch.zeros(2, 3, 4, 3)}, "k has shape (2, 3, 4, 3), but must be (2, 2, 4, 3)"),
    ({"v": torch.zeros(2, 2, 5, 3)}, "v has shape"),
    ({"v": torch.zeros(2, 2, 4, 3, dtype=torch.float64)}, "v is torch.float64, but q is torch.float32"),
    ({"bank_k": torch.zeros(2, 2, 6, 3)}, "bank_k has shape (2, 2, 6, 3), but must be (2, slots, 3)"),
    ({"bank_v": torch.zeros(2, 7, 3)}, "bank_v has shape"),
    ({"bank_v": torch.zeros(2, 6, 3, device="meta")}, "bank_v is on meta"),
    ({"slot_bias": torch.zeros(5)}, "slot_bias has shape (5,)"),
    ({"slot_bias": torch.zeros(6, dtype=torch.int64)}, "slot_bias is torch.int64"),
    ({"gate": torch.zeros(3), "mode": "gated"}, "gate has shape (3,)"),
    ({"mode": "gated"}, "gate is missing"),
    ({"gate": torch.zeros(2)}, "gate is given"),
    ({"mode": "both"}, "mode is 'both'"),
    ({"backend": "cuda"}, "backend is 'cuda'"),
    ({"precision": "fp8"}, "precision is 'fp8'"),
]


@pytest.mark.parametrize(("wrong", "text"), BAD)
def test_bad_input_is_refused_in_one_line(wrong: dict[str, object], text: str) -> None:
    given = {
        "q": torch.zeros(2, 2, 5, 3),
        "k": torch.zeros(2, 2, 4, 3),
        "v": torch.zeros(2, 2, 4, 3),
        "bank_k": torch.zeros(2, 6, 3),
        "bank_v": torch.zeros(2, 6, 3),
        **wrong,
    }

    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is checked below
        decoupled_cross_attention(**given)  # type: ignore[call-overload]

    assert text in str(error.value)
    assert "\n" not in str(error.value)
