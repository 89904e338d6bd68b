"""PyTorch's fused attention on a CPU, called without the checks that PyTorch makes before it.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.
"""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from fedoap.kernels import decoupled_cross_attention

BATCH, HEADS, QUERIES, LENGTH, SLOTS, CHANNELS = 2, 3, 5, 4, 6, 16


def every_second(x: Tensor) -> Tensor:
    """Return x with NaN between any two of its channels in memory."""
    return torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[..., ::2]


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "channels outermost": lambda x: x.mT.contiguous().mT,
    "every second number": every_second,
    "one number a row": lambda x: x[..., :1].expand_as(x),
    "one head for all": lambda x: x[..., :1, :, :].expand_as(x),
}


def tokens(batch: int = BATCH, heads: int = HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    local = ((batch, heads, n, CHANNELS) for n in (QUERIES, LENGTH, LENGTH))
    return [torch.randn(shape, generator=generator) for shape in (*local, *[(heads, SLOTS, CHANNELS)] * 2)]


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("mode", ["joint", "gated"])
def test_tensors_of_any_strides_give_what_their_copies_do(strides: str, mode: Literal["joint", "gated"]) -> None:
    """Planted bug: tokens handed on as they are, whose channels the kernel then reads where none lie."""
    view = STRIDES[strides]
    gate = torch.linspace(-1, 1, QUERIES) if mode == "gated" else None

    def attend(*given: Tensor) -> tuple[Tensor, Tensor]:
        return decoupled_cross_attention(*given, gate=gate, mode=mode, return_lse=True)

    for odd in range(5):
        given = [view(x) if i == odd else x for i, x in enumerate(tokens())]
        out, lse = attend(*given)
        plain_out, plain_lse = attend(*(x.clone(memory_format=torch.contiguous_format) for x in given))
        torch.testing.assert_close(out, plain_out)
        torch.testing.assert_close(lse, plain_lse)


def test_a_bias_of_any_strides_gives_what_its_copy_does() -> None:
    for bias in (torch.arange(12.0)[::2], torch.arange(18.0).view(SLOTS, HEADS).mT, torch.ones(1).expand(SLOTS)):
        given = tokens()
        torch.testing.assert_close(
            decoupled_cross_attention(*given, slot_bias=bias),
            decoupled_cross_attention(*given, slot_bias=bias.clone(memory_format=torch.contiguous_format)),
        )


@pytest.mark.parametrize("sizes", [(0, HEADS), (BATCH, 0), (0, 0)])
def test_a_batch_of_nothing_gives_nothing(sizes: tuple[int, int]) -> None:
    """Planted bug: given to the kernel, which divides by 0 and takes the process with it."""
    given = tokens(*sizes)

    out, lse = decoupled_cross_attention(*given, return_lse=True)

    assert out.shape == given[0].shape
    assert lse.shape == given[0].shape[:3]
