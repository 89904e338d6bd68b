"""Counter-based normal noise in plain PyTorch: element i's value depends on the seed and i alone.

Philox4x32-10 (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3) with the seed as key
and `i // 4` as counter yields four words, of which element i takes the one at `i % 4`. Its top 23
bits become a normal value by the inverse distribution function. So neither the shape of a tile, nor
the batch, nor the device changes any element's noise, and a backward pass can make it again.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# Giles 2010, Approximating the erfinv function, table 5: single precision, highest power first.
_CENTRAL = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
    -0.00125372503, -0.00417768164, 0.246640727, 1.50140941,
)  # fmt: skip
_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
    -0.0076224613, 0.00943887047, 1.00167406, 2.83297682,
)  # fmt: skip


def philox4x32(counter: Words, key: tuple[Tensor, Tensor], rounds: int = 10) -> Words:
    """Return four random 32-bit words for each counter; all words are int64 tensors below 2**32."""
    c0, c1, c2, c3 = counter
    step = torch.arange(rounds, device=key[0].device)
    keys = zip(*(((word + step * weyl) & _MASK).unbind() for word, weyl in zip(key, _WEYL, strict=True)), strict=True)
    for k0, k1 in keys:
        # a product of 32-bit words fills 64 bits, of which int64 keeps all: no sum needs its sign
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((second >> 32) & _MASK) ^ c1 ^ k0, second & _MASK
        c2, c3 = ((first >> 32) & _MASK) ^ c3 ^ k1, first & _MASK
    return c0, c1, c2, c3


def random_bits(seed: Tensor, index: Tensor) -> Tensor:
    """Return each element's 32 random bits, as int64; `seed` is one int64 value, `index` counts elements."""
    group = index // 4
    zero = torch.zeros_like(group)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    words = philox4x32((group & _MASK, group >> 32, zero, zero), key)
    return torch.stack(words, -1).gather(-1, (index % 4).unsqueeze(-1)).squeeze(-1)


def normal_of_bits(bits: Tensor) -> Tensor:
    """Return standard normal values, float32, from 32 random bits each: sqrt(2) erfinv(v).

    The top 23 bits k give v = (2k + 1) / 2**23 - 1, which float32 holds exactly, is never 0 or +-1,
    and turns its sign when the bits are inverted.
    """
    v = ((bits >> 9) * 2 + 1 - 2**23).to(torch.float32) * 2.0**-23
    w = -torch.log((1 - v) * (1 + v))
    central, tail = w - 2.5, torch.sqrt(w) - 3
    return math.sqrt(2) * v * torch.where(w < 5, _polynomial(_CENTRAL, central), _polynomial(_TAIL, tail))


def normal(seed: Tensor, index: Tensor) -> Tensor:
    """Return the standard normal noise, float32, of the elements with these global indices (int64)."""
    return normal_of_bits(random_bits(seed, index))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value
