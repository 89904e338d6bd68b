"""Calls that go round the dispatcher give what those through it give, and only where nobody looks on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedoap.kernels import decoupled_cross_attention, perturbed_boundary_loss

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
