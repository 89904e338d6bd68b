"""A piece of a blob written as its difference from the same piece of another blob, to the last bit.

Two models of consecutive rounds agree in most signs and exponents and in some leading bits. XOR turns
what agrees to zeros, the byte shuffle brings the first bytes of all values together, then the second
and so on, and each of these planes is deflated where that makes it shorter. The last bytes of a
mantissa are noise and stay as they are, which costs no time. Each piece stands alone: it can be packed,
sent and resumed by itself, and whoever has the other blob can unpack it.

A packed piece is, for each plane: `>BI` with a method (0 as it is, 1 deflated) and a length, then so
many bytes. The last plane holds the bytes that are no whole value.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedoap.errors import TensorsError

_PLANE = struct.Struct(">BI")
_AS_IT_IS, _DEFLATED = 0, 1
NOISE_BITS = 7.9
"""Bits of entropy a byte from which a plane is not worth deflating."""
SAMPLED = 16
"""One byte in so many is looked at to find the entropy."""


def pack(new: bytes | memoryview, old: bytes | memoryview, item_bytes: int) -> bytes:
    """Return `new` as its difference from `old`, which is as long; values have `item_bytes` bytes."""
    assert len(new) == len(old)
    difference = np.frombuffer(new, np.uint8) ^ np.frombuffer(old, np.uint8)
    return b"".join(part for plane in _planes(difference, item_bytes) for part in _pack_plane(plane))


def unpack(packed: bytes | memoryview, old: bytes | memoryview, item_bytes: int) -> bytes:
    """Return the bytes that `pack` was given; never takes more memory than a few times `old`.

    Raises:
        TensorsError: it was not packed against something as long as `old`.
    """
    difference = np.zeros(len(old), np.uint8)
    rest = memoryview(packed)
    for plane in _planes(difference, item_bytes):
        body, rest = _unpack_plane(rest, len(plane))
        plane[:] = np.frombuffer(body, np.uint8)
    if rest:
        raise TensorsError(f"delta: {len(rest)} bytes follow the last plane, but none may")
    difference ^= np.frombuffer(old, np.uint8)
    return difference.tobytes()


def _planes(data: NDArray[np.uint8], item_bytes: int) -> Iterator[NDArray[np.uint8]]:
    """Yield views of the values' first bytes, second bytes ..., and of the bytes that are no whole value."""
    whole = len(data) - len(data) % item_bytes
    for byte in range(item_bytes):
        yield data[byte:whole:item_bytes]
    yield data[whole:]


def _pack_plane(plane: NDArray[np.uint8]) -> tuple[bytes, bytes]:
    raw = plane.tobytes()
    if _entropy(plane[::SAMPLED]) < NOISE_BITS:
        # values are as good as independent: a search for repetitions finds only runs of zeros
        packer = zlib.compressobj(1, strategy=zlib.Z_RLE)
        short = packer.compress(raw) + packer.flush()
        if len(short) < len(raw):
            return _PLANE.pack(_DEFLATED, len(short)), short
    return _PLANE.pack(_AS_IT_IS, len(raw)), raw


def _unpack_plane(packed: memoryview, size: int) -> tuple[bytes | memoryview, memoryview]:
    if len(packed) < _PLANE.size:
        raise TensorsError("delta: ends before its last plane")
    method, length = _PLANE.unpack_from(packed)
    body, rest = packed[_PLANE.size : _PLANE.size + length], packed[_PLANE.size + length :]
    plane: bytes | memoryview = body
    if method == _DEFLATED:
        plane = _inflate(body, size)
    if method > _DEFLATED or len(body) != length or len(plane) != size:
        raise TensorsError(f"delta: a plane has {len(plane)} bytes by method {method}, but must have {size}")
    return plane, rest


def _inflate(body: memoryview, size: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        plane = unpacker.decompress(body, size + 1)
    except zlib.error as error:
        raise TensorsError(f"delta: a plane cannot be inflated: {error}") from None
    if not unpacker.eof or unpacker.unused_data:
        raise TensorsError(f"delta: a plane does not inflate to {size} bytes, which it must have")
    return plane


def _entropy(plane: NDArray[np.uint8]) -> float:
    counts = np.bincount(plane, minlength=256)
    share = counts[counts > 0] / max(1, len(plane))
    return float(-(share * np.log2(share)).sum())
