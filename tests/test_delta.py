"""A difference that is taken and applied gives the same bytes, and nothing that was tampered with does harm."""

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoap.delta import pack, unpack
from fedoap.errors import TensorsError
from fedoap.tensors import bfloat16_bits

HEAD = struct.Struct(">BI")


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, bytes, int]:
    """Bytes and others as long that share some or none of their bits, whole values or not."""
    old = draw(st.binary(max_size=600))
    mask = draw(st.sampled_from([b"\x00", b"\xff\x00\x00\x00", b"\x0f", b"\xff", b"\xff\xff\xff"]))
    noise = draw(st.binary(min_size=len(old), max_size=len(old)))
    new = bytes(a ^ (b & mask[i % len(mask)]) for i, (a, b) in enumerate(zip(old, noise, strict=True)))
    return new, old, draw(st.sampled_from([2, 4, 8]))


@given(pairs())
def test_what_was_packed_comes_back_to_the_last_bit(pair: tuple[bytes, bytes, int]) -> None:
    """Planted bugs: the bytes after the last whole value left out; planes written in the wrong order."""
    new, old, item = pair

    assert unpack(pack(new, old, item), old, item) == new


@given(pairs(), st.data())
def test_a_piece_that_was_cut_changed_or_made_longer_is_refused_or_gives_as_many_bytes(
    pair: tuple[bytes, bytes, int], data: st.DataObject
) -> None:
    """Planted bug: bytes after the last plane let through."""
    new, old, item = pair
    packed = bytearray(pack(new, old, item))
    match data.draw(st.sampled_from(["cut", "changed", "longer"])):
        case "cut":
            del packed[data.draw(st.integers(0, len(packed) - 1)) :]
            expected = None
        case "longer":
            packed += b"\0"
            expected = None
        case _:
            at = data.draw(st.integers(0, len(packed) - 1))
            packed[at] ^= data.draw(st.integers(1, 255))
            expected = len(old)

    try:
        length = len(unpack(bytes(packed), old, item))
    except TensorsError:
        return
    assert length == expected


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ((0, 3), b"abc"),
        ((0, 1), b"a"),
        ((0, 4), b"abc"),
        ((1, 9), zlib.compress(b"a", 0)[:9]),
        ((1, 12), zlib.compress(b"a", 0)),
        ((1, 4), b"abcd"),
        ((2, 4), b"abcd"),
    ],
)
def test_a_plane_of_another_length_or_method_is_refused(head: tuple[int, int], body: bytes) -> None:
    """The first of four planes of 4 bytes. Planted bug: its length is not compared, and one byte fills it."""
    rest = (HEAD.pack(0, 4) + b"efgh") * 3 + HEAD.pack(0, 0)

    with pytest.raises(TensorsError, match="delta: "):
        unpack(HEAD.pack(*head) + body + rest, bytes(16), 4)


def test_what_inflates_to_more_than_it_may_is_refused_in_little_memory() -> None:
    """64 MiB of zeros in 64 KiB. Planted bug: inflated as a whole, compared afterwards."""
    bomb = zlib.compress(bytes(1 << 26))
    packed = HEAD.pack(1, len(bomb)) + bomb

    tracemalloc.start()
    with pytest.raises(TensorsError, match="does not inflate to 4 bytes"):
        unpack(packed, bytes(16), 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 1e6


@pytest.mark.parametrize(("item", "most"), [(4, 0.65), (2, 0.28)])
def test_weights_that_moved_a_little_take_less_room(item: int, most: float) -> None:
    """Each weight moves by about 1 %. Planted bug: no shuffle."""
    rng = np.random.default_rng(1)
    old = rng.normal(size=1 << 16).astype(np.float32)
    new = (old * (1 + 0.01 * rng.normal(size=old.size))).astype(np.float32)
    before, after = (x.tobytes() if item == 4 else bfloat16_bits(x).tobytes() for x in (old, new))

    packed = pack(after, before, item)

    assert len(packed) / len(after) < most
    assert unpack(packed, before, item) == after
