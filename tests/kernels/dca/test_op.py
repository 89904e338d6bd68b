"""Decoupled cross-attention's operators and tile tables, where neither a GPU nor an interpreter is at hand.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fedoap.kernels import Precision, decoupled_cross_attention
from fedoap.kernels.dca import op
from fedoap.kernels.dca.problem import Problem, dense_like
from fedoap.kernels.dca.tiles import BACKWARD_CHANNELS, FORWARD_CHANNELS, GATED, TABLE, Tile, Tiles, choose, padded
from fedoap.kernels.hardware import Hardware, assumed

BLOCK = 128
"""Blocks of queries divide this; see `flash_gradients.PADDING`."""


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Let tensors be made on a GPU that is not there: they have shapes and no values."""
    with FakeTensorMode():
        yield


def tokens(length: int, channels: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return (B, H, length, D) on the GPU, heads inside."""
    return torch.empty(2, length, 4, channels, dtype=dtype, device="cuda").transpose(1, 2)


def bank(slots: int, channels: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return (H, M, D) on the GPU."""
    return torch.empty(4, slots, channels, dtype=dtype, device="cuda")


@pytest.mark.parametrize("channels", [40, 64, 256, 1024])
@pytest.mark.parametrize("gated", [False, True])
def test_on_a_gpu_the_output_takes_dtype_and_strides_from_the_queries(channels: int, gated: bool) -> None:
    with fake_gpu():
        q, k, memory = tokens(300, channels), tokens(77, channels), bank(99, channels)
        gate = torch.empty(4, device="cuda") if gated else None

        out, lse = decoupled_cross_attention(
            q, k, k, memory, memory, gate=gate, mode="gated" if gated else "joint", return_lse=True
        )

        assert (out.shape, out.stride(), out.dtype, out.device) == (q.shape, q.stride(), q.dtype, q.device)
        assert (lse.shape, lse.dtype) == ((2, 2, 4, 300) if gated else (2, 4, 300), torch.float32)


@pytest.mark.parametrize(("local", "slots", "width"), [(77, 99, 256), (0, 99, 128), (300, 700, None), (0, 0, None)])
def test_the_wide_route_keeps_weights_no_larger_than_the_queries(local: int, slots: int, width: int | None) -> None:
    with fake_gpu():
        q, k, memory = tokens(300, 512), tokens(local, 512), bank(slots, 512)

        *_, weights, pivots = op.dca_forward(q, k, k, memory, memory, None, None, 1.0, "ieee")

        assert weights.shape == ((0,) if width is None else (2, 4, 300, width))
        assert pivots.shape == ((0,) if width is None else (2, 4, width // 128, 300))


def test_gradients_come_in_the_order_of_the_arguments_those_alone_that_are_wanted() -> None:
    with fake_gpu():
        q, k, memory = tokens(30, 64), tokens(7, 64), bank(9, 64)
        bias, gate = torch.empty(4, 9, device="cuda"), torch.empty(2, 4, 1, device="cuda").expand(2, 4, 30)
        call = (q, k, k, memory, memory, bias, gate, 1.0, "ieee")
        saved = list(op.dca_forward(*call))
        dout = torch.empty((), dtype=torch.bfloat16, device="cuda").expand(q.shape)

        found = op.dca_backward(*call, saved, dout, None, [True, False, True, False, True, True, True])

        assert [x.shape for x in found] == [x.shape for x in (q, k, memory, bias, gate)]
        assert [x.stride() for x in found[:3]] == [x.stride() for x in (q, k, memory)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("gated", [False, True])
def test_on_a_cpu_the_whole_call_compiles(gated: bool) -> None:
    """Would fail with a warning, a cached function or a driver asked on the way."""
    x, memory = torch.randn(2, 2, 5, 8), torch.randn(2, 6, 8)
    gate, bias = torch.randn(2) if gated else None, torch.randn(6)

    def call(x: Tensor, memory: Tensor) -> Tensor:
        return decoupled_cross_attention(
            x, x, x, memory, memory, slot_bias=bias, gate=gate, mode="gated" if gated else "joint"
        )

    torch.testing.assert_close(
        torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")(x, memory), call(x, memory)
    )


def test_memory_like_an_expanded_tensor_has_its_channels_innermost() -> None:
    """Planted bug: axes in the order of their strides alone, so that a stride of 0 counts as innermost."""
    made = dense_like(torch.empty(1, 5, 8).expand(3, 5, 8))

    assert made.stride() == (8, 24, 1)


def problem(channels: int, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> Problem:
    """Return a problem without values."""
    n = {"batch": 8, "heads": 8, "local": 256, "slots": 512} | sizes
    q, k, memory = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in (
            (n["batch"], n["heads"], 256, channels), (n["batch"], n["heads"], n["local"], channels),
            (n["heads"], n["slots"], channels),
        )
    )  # fmt: skip
    return Problem(q, k, k, memory, memory, None, None, 1.0, "tf32")


KINDS: tuple[Hardware, ...] = ("hopper", "ampere", "ada", "cdna")


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_of_the_route_finds_tiles(kind: Hardware) -> None:
    for dtype, numbers, channels in product(
        (torch.bfloat16, torch.float32), FORWARD_CHANNELS, (1, 16, 40, 64, 96, 256)
    ):
        if (numbers == "half") != (dtype.itemsize == 2) or channels > FORWARD_CHANNELS[numbers]:
            continue
        if kind == "cdna" and numbers == "tf32":
            continue  # AMD's products are `ieee`, and those are the wide route's
        with assumed(kind):
            assert choose(problem(channels, dtype)).attend.queries <= BLOCK


def test_blocks_of_queries_divide_the_padding_of_the_statistics() -> None:
    """Planted bug: 96 queries a block, whose statistics lie past the padding."""
    tiles = [tile for entry in TABLE.values() for tile in (entry.dq, entry.dkv)]

    assert [tile for tile in tiles if BLOCK % tile.queries] == []
    assert GATED.keys() <= TABLE.keys()
    assert BACKWARD_CHANNELS.keys() == FORWARD_CHANNELS.keys()


@pytest.mark.parametrize(
    ("sizes", "splits"),
    # blocks of 64 keys: 4 local and 8 of slots for each of 8 heads; 96 programs' worth for each image
    [({}, 2), ({"local": 0}, 3), ({"heads": 1}, 8), ({"heads": 1, "batch": 3}, 3), ({"local": 4096, "slots": 2048}, 1)],
)
def test_the_batch_is_split_until_no_program_does_more_than_its_share(sizes: dict[str, int], splits: int) -> None:
    """Planted bug: the split derived from the bank's programs alone."""
    tile = Tile(64, 64, 4, 1)

    assert Tiles(tile, tile, tile).splits(problem(64, torch.bfloat16, **sizes)) == splits


@pytest.mark.parametrize(("channels", "expected"), [(1, 16), (16, 16), (17, 32), (64, 64), (96, 128), (256, 256)])
def test_channels_are_padded_to_a_power_of_two(channels: int, expected: int) -> None:
    assert padded(channels) == expected


@pytest.mark.parametrize(
    ("precision", "dtype", "kept"), [("tf32", torch.float32, "tf32"), ("tf32x3", torch.bfloat16, "ieee")]
)
def test_precision_is_of_float32_products_alone(precision: Precision, dtype: torch.dtype, kept: Precision) -> None:
    assert replace(problem(64, dtype), precision=precision).product_precision == kept
