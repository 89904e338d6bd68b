"""The noise of the perturbed boundary loss: which words, which values, of which element."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from fedoap.kernels.philox import normal, normal_of_bits, philox4x32, random_bits

ALL_ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ALL_ONES] * 4, [ALL_ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_words_are_the_published_ones(counter: list[int], key: list[int], expected: list[int]) -> None:
    """Known-answer vectors of Random123 for philox4x32 with 10 rounds. Planted bug: the two Weyl constants swapped."""
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)

    words = philox4x32((c0, c1, c2, c3), (torch.tensor(key[0]), torch.tensor(key[1])))

    assert [int(word) for word in words] == expected


@settings(deadline=None, max_examples=30)
@given(st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_bits_are_those_of_an_integer_philox(seed: int, index: list[int]) -> None:
    """The word of lane i % 4 at counter i // 4. Planted bug: the counter's high word dropped."""
    bits = random_bits(torch.tensor(seed), torch.tensor(index))

    assert bits.tolist() == [_philox_by_integers(seed, i // 4)[i % 4] for i in index]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 64), st.integers(1, 5), st.randoms())
def test_noise_does_not_depend_on_how_elements_are_asked_for(size: int, parts: int, random: object) -> None:
    """Any split, any order, same values. Planted bug: lane taken from the position in the request, not the index."""
    index = torch.randperm(size) + 1000
    seed = torch.tensor(7)

    pieces = torch.cat([normal(seed, piece) for piece in index.chunk(parts)])

    assert torch.equal(pieces, normal(seed, torch.arange(1000, 1000 + size))[index - 1000])


def test_normals_are_odd_in_the_bits() -> None:
    """Inverting the bits turns the sign, bit for bit. Planted bug: v = k / 2**22 - 1, off by half a step."""
    bits = torch.tensor([0, 1, 511, 512, 2**31, 2**32 - 1, 0x12345678, 0xDEADBEEF])

    assert torch.equal(normal_of_bits(bits), -normal_of_bits(ALL_ONES - bits))


def test_normals_follow_the_inverse_distribution() -> None:
    """Against float64 at every 641st of the 2**23 values and both ends. Planted bug: two coefficients swapped."""
    k = np.unique(np.concatenate([np.arange(0, 2**23, 641), np.arange(200), 2**23 - 1 - np.arange(200)]))
    expected = np.sqrt(2) * special.erfinv((2 * k.astype(np.float64) + 1) / 2**23 - 1)

    values = normal_of_bits(torch.from_numpy(k << 9)).double().numpy()

    assert np.isfinite(values).all()
    assert np.abs(values - expected).max() < 2e-6


def test_noise_of_many_elements_is_standard_normal() -> None:
    values = normal(torch.tensor(2024), torch.arange(200_000)).double().numpy()

    assert stats.kstest(values, "norm").pvalue > 0.01
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


def test_seeds_differ_beyond_32_bits() -> None:
    index = torch.arange(64)

    assert not torch.equal(normal(torch.tensor(5), index), normal(torch.tensor(5 + 2**32), index))


def _philox_by_integers(seed: int, counter: int) -> list[int]:
    """Philox4x32-10 in unbounded integers, from the paper's figure 2."""
    words = [counter % 2**32, counter >> 32, 0, 0]
    key = [seed % 2**32, (seed >> 32) % 2**32]
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            (second >> 32) ^ words[1] ^ key[0],
            second % 2**32,
            (first >> 32) ^ words[3] ^ key[1],
            first % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return words
