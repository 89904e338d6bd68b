"""The loss's kernels, interpreted, against float64 arithmetic of their own and scipy's morphology.

Tiles are small enough that tiny images take several programs and steps. Buffers that a kernel should
fill hold NaN before.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.utils import get_mask_edges
from torch import Tensor

from boundary_by_hand import by_hand, case, region_by_hand, relative
from fedoap.kernels import Element, Region, philox
from fedoap.kernels.pbl.backward import backward
from fedoap.kernels.pbl.extraction import extract
from fedoap.kernels.pbl.forward import Found, forward
from fedoap.kernels.pbl.noise import normal_of_bits, random_bits
from fedoap.kernels.pbl.problem import Recipe
from fedoap.kernels.pbl.tiles import Tiles

SMALL = Tiles(lanes=32, warps=1, steps=3)
RECIPE = Recipe("both", 1, "square", tau=0.75, sigma=0.7, lam=0.3, smooth=1e-5)
SEED = torch.tensor(11)
TOLERANCES = {torch.float16: 5e-4, torch.bfloat16: 3e-3, torch.float32: 1e-6, torch.float64: 1e-7}
"""Of the gradient; noise is float32 for logits of any type."""


@pytest.fixture(autouse=True)
def fresh_memory_holds_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True, slots=True)
class Computed:
    """What the three passes return."""

    found: Found
    dz: Tensor
    region: Tensor
    noisy: Tensor


def compute(z: Tensor, y: Tensor, recipe: Recipe = RECIPE, tiles: Tiles = SMALL, seed: Tensor = SEED) -> Computed:
    found = forward(z, y, seed, recipe, tiles)
    dz = backward(torch.ones_like(found.loss), z, y, seed, found.sums, found.marks, recipe, tiles)
    return Computed(found, dz, *extract(z, y, seed, recipe, tiles))


def check(z: Tensor, y: Tensor, recipe: Recipe = RECIPE, tiles: Tiles = SMALL) -> Computed:
    """Compute and compare all of it, with tau = 0.75."""
    computed = compute(z, y, recipe, tiles)
    region = region_by_hand(z, y, recipe.region, recipe.radius, recipe.element)
    loss, slope = by_hand(z, y, region, seed=11, sigma=recipe.sigma, lam=recipe.lam, smooth=recipe.smooth)
    noise = philox.normal(SEED, torch.arange(z.numel())).view(z.shape).double().numpy()
    assert np.array_equal(computed.region.numpy(), region)
    assert computed.found.voxels.tolist() == region.sum(axis=tuple(range(1, z.dim()))).tolist()
    assert computed.found.loss.item() == pytest.approx(loss, rel=1e-6 if z.dtype != torch.float64 else 1e-7)
    assert computed.dz.dtype == z.dtype
    assert relative(computed.dz, slope) < TOLERANCES[z.dtype]
    assert np.abs(computed.noisy.double().numpy() - z.double().numpy() - recipe.sigma * noise * region).max() < 2e-6
    return computed


@triton.jit
def draw(out_ptr, normal_ptr, seed_ptr, first, LANES: tl.constexpr, VEC: tl.constexpr):
    group = first.to(tl.int64) // VEC + tl.arange(0, LANES)
    bits = random_bits(tl.load(seed_ptr), group, VEC)
    place = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    tl.store(out_ptr + place, bits.to(tl.int64))
    tl.store(normal_ptr + place, normal_of_bits(bits))


@pytest.mark.parametrize("vec", [1, 4, 8])
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, -1])
@pytest.mark.parametrize("first", [0, 2**34 - 8])
def test_noise_is_that_of_plain_pytorch(vec: int, seed: int, first: int) -> None:
    """Words bit for bit. Planted bugs: the counter's high word dropped, words 1 and 2 of a group swapped."""
    bits, normals = torch.zeros(64, dtype=torch.int64), torch.zeros(64)

    draw[(1,)](bits, normals, torch.tensor(seed), first, 64 // vec, vec)

    index = torch.arange(first, first + 64)
    assert torch.equal(bits, philox.random_bits(torch.tensor(seed), index))
    assert (normals - philox.normal(torch.tensor(seed), index)).abs().max() < 1e-6


@pytest.mark.parametrize("region", ["error", "band", "both"])
@pytest.mark.parametrize("shape", [(2, 1, 7, 24), (3, 1, 9, 7), (2, 1, 4, 5, 8), (2, 1, 3, 5, 7)])
def test_loss_gradient_and_region_match_the_formulas(shape: tuple[int, ...], region: Region) -> None:
    """Planted bugs: lanes beyond the last row counted, dilation over a row's end into the next row and over a
    sample's end into the next sample, the finalize step without the last program."""
    z, y = case(shape)

    check(z, y, replace(RECIPE, region=region))


@pytest.mark.parametrize("element", ["square", "cross"])
@pytest.mark.parametrize("shape", [(2, 1, 6, 16), (2, 1, 9, 35), (2, 1, 4, 5, 8)])
@pytest.mark.parametrize("radius", [0, 1, 2, 3])
def test_bands_of_any_radius_are_scipys(shape: tuple[int, ...], radius: int, element: Element) -> None:
    """Planted bugs: a cross with corners, one step too few."""
    z, y = case(shape)
    recipe = replace(RECIPE, region="band", radius=radius, element=element)

    region, _ = extract(z, y, SEED, recipe, SMALL)

    assert np.array_equal(region.numpy(), region_by_hand(z, y, "band", radius, element))


@pytest.mark.parametrize(("radius", "region"), [(2, "both"), (3, "band"), (0, "both")])
def test_larger_radii_reach_loss_and_gradient(radius: int, region: Region) -> None:
    z, y = case((2, 1, 9, 35))

    check(z, y, replace(RECIPE, region=region, radius=radius))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 1, 5, 24), (2, 1, 5, 9)])
def test_logits_of_every_type(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    z, y = case(shape, dtype)

    check(z, y)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_targets_of_every_type(dtype: torch.dtype) -> None:
    z, y = case((2, 1, 5, 8))

    check(z, y.to(dtype))


def test_soft_targets() -> None:
    z, y = case((2, 1, 5, 8))
    soft = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) * 0.2 + y * 0.8

    check(z, soft)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("region", ["error", "both"])
def test_sizes_around_a_tile(size: int, region: Region) -> None:
    z, y = case((1, 1, 1, size))

    check(z, y, replace(RECIPE, region=region), Tiles(lanes=64, warps=1, steps=4))


@settings(deadline=None, max_examples=6)
@given(
    st.integers(1, 2), st.lists(st.integers(1, 9), min_size=2, max_size=3), st.sampled_from(["error", "band", "both"]),
    st.sampled_from(["square", "cross"]), st.sampled_from([1, 2]), st.sampled_from([16, 64]), st.integers(1, 5),
)  # fmt: skip
def test_any_shape_and_tile(
    batch: int, sizes: list[int], region: Region, element: Element, radius: int, lanes: int, steps: int
) -> None:
    z, y = case((batch, 1, *sizes))

    check(z, y, replace(RECIPE, region=region, element=element, radius=radius), Tiles(lanes, 1, steps))


@pytest.mark.parametrize("region", ["error", "both"])
def test_noise_and_gradient_do_not_depend_on_tiles(region: Region) -> None:
    """Planted bug: noise keyed by program and lane."""
    z, y = case((2, 1, 6, 20))
    recipe = replace(RECIPE, region=region)
    first = compute(z, y, recipe, Tiles(16, 1, 2))

    for tiles in (Tiles(32, 1, 6), Tiles(128, 2, 1)):
        other = compute(z, y, recipe, tiles)
        assert torch.equal(other.noisy, first.noisy)
        assert torch.allclose(other.dz, first.dz, rtol=1e-5, atol=1e-9)  # their sums differ in the last bits


def test_the_same_bits_twice() -> None:
    z, y = case((2, 1, 6, 20))

    one, two = compute(z, y), compute(z, y)

    assert torch.equal(one.dz, two.dz)
    assert torch.equal(one.found.loss, two.found.loss)
    assert torch.equal(one.found.sums, two.found.sums)


def test_inputs_may_be_slices_and_expanded() -> None:
    z, y = case((2, 1, 6, 16))
    wide = torch.stack([z, z * 0.5, -z], 1).squeeze(2)  # (B, 3, H, W)
    cases = [
        (wide[:, 1:2], y),  # samples dense, not the batch
        (z.transpose(2, 3).contiguous().transpose(2, 3), y),
        (z[:, :, ::2, 1::2], y[:, :, ::2, 1::2]),
        (z[:1].expand(2, 1, 6, 16), y[:1].expand(2, 1, 6, 16)),
        (z.flatten()[3:99].view(2, 1, 6, 8), y.flatten()[3:99].view(2, 1, 6, 8)),
    ]

    for logits, target in cases:
        check(logits, target)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extreme_logits_stay_finite(value: float) -> None:
    z = torch.full((1, 1, 4, 8), value)
    z[..., ::2] *= -1
    y = (torch.arange(32) % 3 == 0).view(z.shape)

    computed = compute(z, y)

    wrong = ((z > 0) != y).float().mean().item()
    assert computed.found.clean.item() == pytest.approx(wrong * 1e4, rel=1e-3)
    assert torch.isfinite(computed.dz).all()


def test_confident_logits_keep_a_relative_loss() -> None:
    """A BCE far below float32's resolution of 1 is still right. Planted bug: log(1 + e) taken literally."""
    y = (torch.arange(64) % 2 == 0).view(1, 1, 8, 8)
    z = torch.where(y, 18.0, -18.0)

    clean = forward(z, y, SEED, replace(RECIPE, smooth=1e-12), SMALL).clean.double().item()
    bce = math.log1p(math.exp(-18))

    assert clean == pytest.approx(bce, rel=1e-5)
    assert relative(compute(z, y).dz, by_hand(z, y, np.zeros(z.shape, bool), seed=1, sigma=0, lam=0)[1]) < 1e-3


@pytest.mark.parametrize("region", ["error", "band", "both"])
def test_a_logit_that_is_nan_makes_the_loss_nan_and_leaves_the_region_defined(region: Region) -> None:
    z, y = case((2, 1, 5, 8))
    z[0, 0, 2, 3] = torch.nan
    outside = torch.where(z.isnan(), -1.0, z)  # a NaN is not above 0

    computed = compute(z, y, replace(RECIPE, region=region))

    expected = region_by_hand(outside, y, region)
    if region != "band":
        expected[0, 0, 2, 3] = False
    assert torch.isnan(computed.found.loss)
    assert not torch.isnan(computed.found.clean[1])
    assert np.array_equal(computed.region.numpy(), expected)


@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_mask_without_edge_has_no_band(sign: float, radius: int) -> None:
    """Planted bug: bits beyond a row's end taken for voxels outside the mask."""
    z = torch.full((2, 1, 3, 35), 3 * sign)

    computed = compute(z, torch.ones(z.shape, dtype=torch.bool), replace(RECIPE, region="band", radius=radius))

    assert computed.found.voxels.tolist() == [0, 0]
    assert torch.equal(computed.found.clean, computed.found.perturbed)


@pytest.mark.parametrize("bad", [torch.tensor(2, dtype=torch.uint8), torch.tensor(1.5), torch.tensor(torch.nan)])
def test_a_target_that_leaves_0_to_1_makes_its_samples_loss_nan(bad: Tensor) -> None:
    """Where nobody looked at the values before: on a GPU. Planted bug: the check left out of the kernel."""
    z, y = case((2, 1, 5, 8))
    target = y.to(bad.dtype)
    target[1, 0, 2, 2] = bad

    found = forward(z, target, SEED, RECIPE, SMALL)

    assert torch.isnan(found.loss)
    assert torch.isnan(found.clean).tolist() == [False, True]


def test_the_inner_edge_is_monais() -> None:
    """MONAI's edge is the mask without its erosion by a cross: the band's part inside the mask."""
    mask = torch.zeros(1, 1, 12, 16, dtype=torch.bool)
    mask[0, 0, 3:9, 4:11] = True
    mask[0, 0, 5, 11] = True
    z = torch.where(mask, 1.0, -1.0)
    recipe = replace(RECIPE, region="band", element="cross")

    region, _ = extract(z, mask, SEED, recipe, SMALL)

    edge, _ = get_mask_edges(mask[0, 0].numpy(), mask[0, 0].numpy(), crop=False)
    assert np.array_equal((region & mask)[0, 0].numpy(), np.asarray(edge))
