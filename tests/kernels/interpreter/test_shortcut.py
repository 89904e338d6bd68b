"""Calls that go round the dispatcher give what those through it give, and only where nobody looks on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedoap.kernels import decoupled_cross_attention, perturbed_boundary, perturbed_boundary_loss

Call = Callable[[], tuple[Tensor, ...]]


class Recording(TorchDispatchMode):
    """Looks on, and writes down fedoap's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Callable[..., object], _types: object, args: tuple[object, ...] = (), kwargs: Any = None
    ) -> object:
        if "fedoap" in str(func):
            self.seen.append(str(func).removeprefix("fedoap.").removesuffix(".default"))
        return func(*args, **(kwargs or {}))


class RecordingFunctions(TorchFunctionMode):
    """The same one level higher, where functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Callable[..., object], _types: object, args: tuple[object, ...] = (), kwargs: Any = None
    ) -> object:
        if "fedoap" in str(func):
            self.seen.append(str(func).removeprefix("fedoap.").removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def attention(*, wants: bool = True) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn((1, 1, 3, 16), generator=generator, requires_grad=wants) for _ in range(3))
    bank = torch.randn((1, 2, 16), generator=generator)
    out, lse = decoupled_cross_attention(q, k, v, bank, bank, return_lse=True, backend="triton", precision="tf32")
    return (out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))) if wants else (out, lse)


def boundary(*, wants: bool = True) -> tuple[Tensor, ...]:
    logits = torch.linspace(-2, 2, 64).view(1, 1, 8, 8).requires_grad_(wants)
    target = (logits.detach() > 0.5).to(torch.uint8)
    loss, parts = perturbed_boundary_loss(logits, target, seed=1, return_parts=True, backend="triton")
    given = (loss, parts.clean, parts.perturbed, parts.voxels)
    return (*given, *torch.autograd.grad(loss, logits)) if wants else given


@pytest.mark.parametrize(("call", "operator"), [(attention, "dca_forward"), (boundary, "pbl_forward")])
def test_who_overrides_functions_sees_them(call: Call, operator: str) -> None:
    """Planted bug: only modes of the dispatcher asked for."""
    with RecordingFunctions() as mode:
        call()

    assert operator in mode.seen


def negated(x: Tensor) -> Tensor:
    """Return x as a view of -x, whose sign nobody has flipped in memory."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def lazily(x: Tensor) -> Tensor:
    """Return x likewise, its neighbours side by side."""
    return torch._neg_view(-x)


@pytest.mark.parametrize("view", [negated, lazily])
def test_a_view_of_the_opposite_sign_is_read_right(view: Callable[[Tensor], Tensor]) -> None:
    """Planted bug: signs not asked for, so that kernels read what is in memory."""
    q, bank = torch.randn((1, 1, 3, 16)), torch.randn((1, 2, 16))
    gate, bias = torch.rand(1, 1, 3), torch.randn(1, 2)
    z, y = torch.linspace(-2, 2, 64).view(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)

    def attend(tokens: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        return decoupled_cross_attention(
            q, tokens, tokens, bank, bank, gate=gate, slot_bias=bias, mode="gated", backend="triton"
        )

    def loss(z: Tensor) -> Tensor:
        return perturbed_boundary_loss(z, y, seed=1, region="band", backend="triton")

    assert view(gate).is_neg()
    assert torch.equal(attend(view(q), view(gate), view(bias)), attend(q, gate, bias))
    assert torch.equal(loss(view(z)), loss(z))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # forward_ad's own
def test_a_forward_derivative_is_refused() -> None:
    """Planted bug: no refusal; the derivative is then 0 without a word."""
    q, bank, z = torch.randn((1, 1, 3, 16)), torch.randn((1, 2, 16)), torch.zeros(1, 1, 8, 8)
    calls: tuple[tuple[Tensor, Callable[[Tensor], Tensor]], ...] = (
        (q, lambda x: decoupled_cross_attention(x, q, q, bank, bank, backend="triton")),
        (z, lambda x: perturbed_boundary_loss(x, z, seed=1, backend="triton")),
        (z, lambda x: perturbed_boundary(x, z, seed=1, backend="triton").logits),
    )

    for x, call in calls:
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            call(forward_ad.make_dual(x, torch.ones_like(x)))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(call, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize(
    ("call", "operators"), [(attention, ["dca_forward", "dca_backward"]), (boundary, ["pbl_forward", "pbl_backward"])]
)
def test_who_looks_on_sees_the_operators_and_everybody_gets_the_same_bits(call: Call, operators: list[str]) -> None:
    """Planted bugs: modes not asked for; the gradient taken round the dispatcher whatever looks on."""
    unseen = call()
    with Recording() as mode:
        seen = call()

    assert mode.seen == operators
    for ours, theirs in zip(unseen, seen, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("call", [attention, boundary])
def test_without_gradients_the_values_are_the_same(call: Callable[..., tuple[Tensor, ...]]) -> None:
    plain = call(wants=False)
    for ours, theirs in zip(plain, call(), strict=False):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad
    with torch.no_grad():
        assert torch.equal(plain[0], call(wants=False)[0])


def test_only_loss_and_attention_have_gradients() -> None:
    logits = torch.zeros((1, 1, 8, 8), requires_grad=True)
    loss, parts = perturbed_boundary_loss(
        logits, torch.zeros(1, 1, 8, 8), seed=1, return_parts=True, backend="triton"
    )  # fmt: skip

    assert loss.requires_grad
    assert not any(part.requires_grad for part in (parts.clean, parts.perturbed, parts.voxels))
