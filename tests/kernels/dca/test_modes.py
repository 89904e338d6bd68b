"""Plain PyTorch's attention under autocast and on the meta device.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.
"""

from typing import Literal

import pytest
import torch
from torch import Tensor

from fedoap.kernels import decoupled_cross_attention

SHAPES = ((2, 3, 5, 8), (2, 3, 4, 8), (2, 3, 4, 8), (3, 6, 8), (3, 6, 8))


def tokens(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("mode", ["joint", "gated"])
def test_autocast_around_the_backward_pass_changes_no_bit(mode: Literal["joint", "gated"]) -> None:
    """Planted bug: autocast left on in the backward pass, whose products then have two dtypes."""
    given = [x.requires_grad_() for x in tokens()]
    out = decoupled_cross_attention(*given, mode=mode, gate=torch.ones(3) if mode == "gated" else None).square().sum()

    expected = torch.autograd.grad(out, given, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, given)

    assert all(map(torch.equal, found, expected))


def test_autocast_leaves_float64_alone_as_pytorchs_attention_does() -> None:
    given = tokens(torch.float64)

    with torch.autocast("cpu", torch.bfloat16):
        out = decoupled_cross_attention(*given)

    assert torch.equal(out, decoupled_cross_attention(*given))


def test_autocast_makes_no_tokens_of_whole_numbers() -> None:
    """Planted bug: whatever comes cast before it is checked."""
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"q is torch\.int64"):
        decoupled_cross_attention(*tokens(torch.int64))


def test_on_the_meta_device_shapes_come_out() -> None:
    given = [x.to("meta") for x in tokens()]

    out, lse = decoupled_cross_attention(*given, return_lse=True)

    assert (out.shape, out.stride(), lse.shape) == (given[0].shape, given[0].stride(), (2, 3, 5))
