"""`fedoap.kernels.philox` inside a kernel: the same words, bit for bit, and the same normal values.

An element's noise depends on the seed and its global index alone, so it does not matter which program,
tile or pass asks for it. VEC consecutive elements form a group; a Philox counter yields four words, so
where VEC is a multiple of four no word is thrown away.
"""

import triton
import triton.language as tl


@triton.jit
def random_bits(seed, group, VEC: tl.constexpr):
    """Return 32 random bits for each element of groups, uint32 (LANES, VEC); `group` is int64 (LANES,)."""
    if VEC == 1:
        w0, w1, w2, w3 = _words(seed, group >> 2)
        word = (group & 3).to(tl.int32)
        bits = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))[:, None]
    else:
        FOURS: tl.constexpr = VEC // 4
        w0, w1, w2, w3 = _words(seed, group[:, None] * FOURS + tl.arange(0, FOURS)[None, :])
        # the last two dimensions of the join count 0 1 2 3
        bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [group.shape[0], VEC])
    return bits


@triton.jit
def _words(seed, counter):
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, low * 0, low * 0)


@triton.jit
def normal_of_bits(bits):
    """Return standard normal values, float32, from 32 random bits each: sqrt(2) erfinv(v) after Giles 2010."""
    v = ((bits >> 9).to(tl.int32) * 2 - 8388607).to(tl.float32) * 1.1920928955078125e-07
    w = -tl.log((1.0 - v) * (1.0 + v))
    central = w < 5.0
    x = tl.where(central, w - 2.5, tl.sqrt(w) - 3.0)
    p = tl.where(central, 2.81022636e-08, -0.000200214257)
    p = p * x + tl.where(central, 3.43273939e-07, 0.000100950558)
    p = p * x + tl.where(central, -3.5233877e-06, 0.00134934322)
    p = p * x + tl.where(central, -4.39150654e-06, -0.00367342844)
    p = p * x + tl.where(central, 0.00021858087, 0.00573950773)
    p = p * x + tl.where(central, -0.00125372503, -0.0076224613)
    p = p * x + tl.where(central, -0.00417768164, 0.00943887047)
    p = p * x + tl.where(central, 0.246640727, 1.00167406)
    p = p * x + tl.where(central, 1.50140941, 2.83297682)
    return 1.4142135623730951 * v * p


@triton.jit
def noise(seed_ptr, group, sigma, VEC: tl.constexpr):
    """Return sigma times the normal noise of groups of elements, float32 (LANES, VEC)."""
    return sigma * normal_of_bits(random_bits(tl.load(seed_ptr), group, VEC))
