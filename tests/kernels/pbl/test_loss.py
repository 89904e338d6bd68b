"""The perturbed boundary loss against float64 arithmetic without autograd, and scipy's morphology."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from boundary_by_hand import band_by_scipy, by_hand, case, region_by_hand
from fedoap.kernels import Element, Region, perturbed_boundary, perturbed_boundary_loss
from fedoap.kernels.philox import normal

SHAPES = [(1, 1, 1, 1), (3, 1, 9, 7), (2, 1, 32, 33), (2, 1, 5, 6, 7)]
REGIONS: tuple[Region, ...] = ("error", "band", "both")
ELEMENTS: tuple[Element, ...] = ("square", "cross")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_value_and_gradient_match_the_formulas(shape: tuple[int, ...], region: Region, dtype: torch.dtype) -> None:
    """Planted bugs: noise kept out of the gradient's point, Dice over the batch, smooth only below, lam swapped."""
    z, y = case(shape)
    z.requires_grad_()

    loss = perturbed_boundary_loss(z, y.to(dtype), seed=11, region=region, sigma=0.7, lam=0.3, radius=2)
    torch.autograd.backward([loss])

    where = region_by_hand(z.detach(), y, region, radius=2)
    expected, slope = by_hand(z.detach(), y, where, seed=11, sigma=0.7, lam=0.3)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert z.grad is not None
    assert np.linalg.norm(z.grad.numpy() - slope) <= 1e-6 * np.linalg.norm(slope)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-4), (torch.bfloat16, 3e-3)])
def test_half_precision_logits_cost_only_the_gradients_rounding(dtype: torch.dtype, tolerance: float) -> None:
    z, y = case((2, 1, 32, 33), dtype)
    z.requires_grad_()

    loss = perturbed_boundary_loss(z, y, seed=5, region="band", sigma=0.5, lam=0.5)
    torch.autograd.backward([loss])

    where = region_by_hand(z.detach(), y, "band")
    expected, slope = by_hand(z.detach(), y, where, seed=5, sigma=0.5, lam=0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert z.grad is not None
    assert z.grad.dtype == dtype
    assert np.linalg.norm(z.grad.double().numpy() - slope) < tolerance * np.linalg.norm(slope)


def test_soft_targets_err_by_their_distance() -> None:
    z = torch.tensor([[[[2.0, 2.0, -2.0, 0.0]]]])  # sigmoid: 0.881 0.881 0.119 0.5
    y = torch.tensor([[[[0.1, 0.2, 0.9, 0.0]]]])

    region = perturbed_boundary(z, y, seed=0, tau=0.75).region

    assert region.tolist() == [[[[True, False, True, False]]]]


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([(2, 1, 7, 9), (1, 1, 1, 12), (2, 1, 4, 5, 6), (1, 1, 2, 9, 3)]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from(ELEMENTS),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_the_band_is_scipys_dilation_minus_erosion(
    shape: tuple[int, ...], radius: int, element: Element, share: float, seed: int
) -> None:
    """2-D and 3-D, radius 1 to 3. Planted bugs: z >= 0, erosion padded with background, cross of one step only."""
    z = torch.from_numpy(np.random.default_rng(seed).random(shape) - share).float()
    y = torch.zeros(shape, dtype=torch.bool)

    region = perturbed_boundary(z, y, seed=0, region="band", radius=radius, element=element).region

    assert np.array_equal(region.numpy(), band_by_scipy(z.numpy() > 0, radius, element))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_mask_without_edge_has_no_band(sign: float) -> None:
    z = torch.full((2, 1, 8, 8), 3 * sign)
    y = torch.ones(2, 1, 8, 8, dtype=torch.bool)

    loss, parts = perturbed_boundary_loss(z, y, seed=1, region="band", return_parts=True)

    assert parts.voxels.tolist() == [0, 0]
    assert torch.equal(parts.clean, parts.perturbed)
    assert torch.isfinite(loss)


def test_logits_of_zero_are_outside_and_thresholds_exclusive() -> None:
    threshold = math.log(3)  # of tau = 0.75
    z = torch.tensor([[[[threshold, math.nextafter(threshold, 9), 0.0, -0.0]]]], dtype=torch.float64)
    y = torch.zeros(1, 1, 1, 4, dtype=torch.bool)

    assert perturbed_boundary(z, y, seed=0, region="error").region.tolist() == [[[[False, True, False, False]]]]
    assert perturbed_boundary(z, y, seed=0, region="band").region.tolist() == [[[[False, True, True, False]]]]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(0, 2**63 - 1))
def test_a_voxels_noise_depends_on_its_index_in_the_batch_alone(batch: int, seed: int) -> None:
    """The first samples of a larger batch get the same noise. Planted bug: index counted within the region."""
    z, y = case((5, 1, 8, 8))

    whole = perturbed_boundary(z, y, seed=seed, region="error", tau=0.5).logits
    part = perturbed_boundary(z[:batch], y[:batch], seed=torch.tensor(seed), region="error", tau=0.5).logits

    assert torch.equal(part, whole[:batch])


def test_noise_is_sigma_times_normal_in_the_region_and_nothing_outside() -> None:
    z, y = case((2, 1, 16, 16), torch.float64)

    made = perturbed_boundary(z, y, seed=3, sigma=0.25, region="band")

    noise = normal(torch.tensor(3), torch.arange(z.numel())).view(z.shape)
    assert made.region.any()
    assert torch.equal(made.logits, z + torch.where(made.region, 0.25 * noise, 0.0).double())


def test_logits_in_another_memory_order_give_the_same_loss() -> None:
    z, y = case((2, 1, 16, 12))
    strided = z.transpose(2, 3).contiguous().transpose(2, 3)

    assert torch.equal(
        perturbed_boundary_loss(strided, y, seed=9, region="band"), perturbed_boundary_loss(z, y, seed=9, region="band")
    )


@pytest.mark.parametrize("region", REGIONS)
def test_gradients_agree_with_differences(region: Region) -> None:
    z, y = case((2, 1, 4, 5), torch.float64)

    def function(logits: Tensor) -> Tensor:
        return perturbed_boundary_loss(logits, y, seed=2, region=region, sigma=0.5, lam=0.5)

    assert torch.autograd.gradcheck(function, (z.requires_grad_(),))


def test_parts_add_up_to_the_loss() -> None:
    z, y = case((3, 1, 16, 16))

    loss, parts = perturbed_boundary_loss(z, y, seed=2, region="band", lam=0.25, return_parts=True)

    assert loss.item() == pytest.approx(float((0.75 * parts.clean + 0.25 * parts.perturbed).mean()), rel=1e-6)
    expected = perturbed_boundary(z, y, seed=2, region="band").region.flatten(1).sum(1)
    assert torch.equal(parts.voxels, expected)


def test_a_logit_that_is_nan_makes_the_loss_nan() -> None:
    z, y = case((2, 1, 8, 8))
    z[0, 0, 3, 3] = torch.nan

    assert all(torch.isnan(perturbed_boundary_loss(z, y, seed=1, region=region)) for region in REGIONS)


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 1, 0, 8), (2, 1, 8, 8, 0)])
def test_a_batch_without_voxels_costs_nothing(shape: tuple[int, ...]) -> None:
    z = torch.zeros(shape, requires_grad=True)

    loss, parts = perturbed_boundary_loss(z, torch.zeros(shape), seed=1, region="both", return_parts=True)
    torch.autograd.backward([loss])

    assert loss.item() == 0
    assert parts.voxels.tolist() == [0] * shape[0]


def test_extreme_logits_stay_finite() -> None:
    z = torch.tensor([[[[1e4, -1e4, 1e4, -1e4]]]], requires_grad=True)
    y = torch.tensor([[[[True, False, False, True]]]])

    loss = perturbed_boundary_loss(z, y, seed=1)
    torch.autograd.backward([loss])

    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert loss.item() == pytest.approx(5000 + 0.5, rel=1e-5)  # BCE 2 * 1e4 / 4; one of two found, one wrong


def test_autocast_changes_nothing() -> None:
    z, y = case((2, 1, 16, 16))

    with torch.autocast("cpu", torch.bfloat16):
        inside = perturbed_boundary_loss(z, y, seed=4, region="band")

    assert torch.equal(inside, perturbed_boundary_loss(z, y, seed=4, region="band"))


BAD: list[tuple[dict[str, object], str]] = [
    ({"logits": torch.zeros(2, 2, 4, 4)}, "logits have shape (2, 2, 4, 4)"),
    ({"logits": torch.zeros(2, 4, 4)}, "logits have shape (2, 4, 4)"),
    ({"logits": torch.zeros(2, 1, 4, 4, dtype=torch.int64)}, "logits are torch.int64"),
    ({"target": torch.zeros(2, 1, 4, 5)}, "target has shape (2, 1, 4, 5), but the logits have (2, 1, 4, 4)"),
    ({"target": torch.zeros(2, 1, 4, 4, dtype=torch.int64)}, "target is torch.int64"),
    ({"target": torch.zeros(2, 1, 4, 4, device="meta")}, "target is on meta"),
    ({"target": torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)}, "target ranges from 255 to 255"),
    ({"target": torch.full((2, 1, 4, 4), -0.1)}, "target ranges from -0.1"),
    ({"target": torch.full((2, 1, 4, 4), torch.nan)}, "target ranges from nan"),
    ({"logits": torch.zeros(2, 1, 4, 4, dtype=torch.float8_e5m2)}, "logits are torch.float8_e5m2, but must be a float"),
    ({"target": torch.zeros(2, 1, 4, 4, dtype=torch.float8_e5m2)}, "target is torch.float8_e5m2"),
    ({"seed": 1.5}, "seed is 1.5, but must be an int or one int64"),
    ({"seed": torch.tensor([1, 2])}, "seed is torch.int64 of 2 elements"),
    ({"seed": torch.tensor(1.0)}, "seed is torch.float32"),
    ({"seed": 2**63}, "seed is 9223372036854775808"),
    ({"radius": -1}, "radius is -1"),
    ({"element": "disk"}, "element is 'disk'"),
    ({"region": "edge"}, "region is 'edge'"),
    ({"sigma": -0.1}, "sigma is -0.1"),
    ({"tau": 1.0}, "tau is 1.0"),
    ({"lam": 1.5}, "lam is 1.5"),
    ({"smooth": 0.0}, "smooth is 0.0"),
    ({"backend": "cuda"}, "backend is 'cuda'"),
]


@pytest.mark.parametrize(("wrong", "text"), BAD)
def test_bad_input_is_refused_in_one_line(wrong: dict[str, object], text: str) -> None:
    given = {"logits": torch.zeros(2, 1, 4, 4), "target": torch.zeros(2, 1, 4, 4), "seed": 1, **wrong}

    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is checked below
        perturbed_boundary_loss(**given)  # type: ignore[call-overload]

    assert text in str(error.value)
    assert "\n" not in str(error.value)
