"""The loss's kernels on a GPU: real shapes, the plain loss on the CPU beside them, bits, graphs, sizes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from boundary_by_hand import by_hand, relative
from fedoap.kernels import Element, Region, perturbed_boundary, perturbed_boundary_loss
from fedoap.kernels.pbl import reference
from fedoap.kernels.pbl.forward import forward
from fedoap.kernels.pbl.problem import Recipe

pytestmark = pytest.mark.gpu

IMAGES, VOLUMES = (64, 1, 512, 512), (2, 1, 160, 160, 160)
TOLERANCES = {torch.float16: 5e-4, torch.bfloat16: 3e-3, torch.float32: 2e-6}


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return smooth logits with a few per cent of the voxels wrong at an edge, and a target, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    pool = F.avg_pool2d if len(shape) == 4 else F.avg_pool3d
    y, change = (pool(torch.randn(shape, generator=generator, device="cuda"), 5, stride=1, padding=2) for _ in range(2))
    return (4 * (y + 0.3 * change) / y.square().mean().sqrt()).to(dtype), (y > 0).to(torch.uint8)


def loss_and_gradient(
    z: Tensor, y: Tensor, region: Region, radius: int = 1, *, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of `factor` times it."""
    leaf = z.detach().requires_grad_()
    loss = perturbed_boundary_loss(leaf, y, seed=7, region=region, radius=radius, backend="triton")
    (gradient,) = torch.autograd.grad([loss * factor], [leaf])
    return loss.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("region", ["error", "band", "both"])
@pytest.mark.parametrize("shape", [IMAGES, VOLUMES, (3, 1, 77, 131), (1, 1, 5, 33, 1000), (1, 1, 1, 1)])
def test_loss_gradient_and_region_are_the_plain_ones(
    shape: tuple[int, ...], region: Region, dtype: torch.dtype
) -> None:
    """The region bit for bit; the loss times its voxels, as a mean's gradient vanishes in 16 bits."""
    z, y = case(shape, dtype)

    loss, gradient = loss_and_gradient(z, y, region, factor=z.numel())
    made = perturbed_boundary(z, y, seed=7, region=region, backend="triton")

    expected = perturbed_boundary(z.cpu(), y.cpu(), seed=7, region=region, backend="eager")
    double = z.double().requires_grad_()
    value = perturbed_boundary_loss(double, y, seed=7, region=region, backend="eager")
    (slope,) = torch.autograd.grad([value * z.numel()], [double])
    assert torch.equal(made.region.cpu(), expected.region)
    assert (made.logits.cpu() - expected.logits).abs().max() < 2e-6
    assert loss.item() == pytest.approx(value.item(), rel=2e-6)
    assert (gradient - slope).norm() < TOLERANCES[dtype] * slope.norm()


@pytest.mark.parametrize("element", ["square", "cross"])
@pytest.mark.parametrize("radius", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("shape", [(4, 1, 200, 131), (2, 1, 40, 50, 60)])
def test_bands_of_any_radius_are_the_plain_ones(shape: tuple[int, ...], radius: int, element: Element) -> None:
    z, y = case(shape)

    made = perturbed_boundary(z, y, seed=7, region="band", radius=radius, element=element, backend="triton")

    expected = perturbed_boundary(
        z.cpu(), y.cpu(), seed=7, region="band", radius=radius, element=element, backend="eager"
    )
    assert torch.equal(made.region.cpu(), expected.region)


def test_soft_targets_and_float64() -> None:
    z, y = case((4, 1, 96, 100), torch.float64)
    soft = (y * 0.9 + 0.05).float()

    loss, gradient = loss_and_gradient(z, soft, "both")

    where = perturbed_boundary(z, soft, seed=7, region="both", backend="triton").region.cpu().numpy()
    value, slope = by_hand(z.cpu(), soft.cpu(), where, seed=7, sigma=0.1, lam=0.1)
    assert loss.item() == pytest.approx(value, rel=1e-7)
    assert relative(gradient, slope) < 1e-7


@pytest.mark.parametrize(("shape", "radius"), [(IMAGES, 1), (VOLUMES, 1), ((4, 1, 300, 300), 3)])
def test_two_hundred_runs_give_the_same_bits(shape: tuple[int, ...], radius: int) -> None:
    z, y = case(shape)
    loss, gradient = loss_and_gradient(z, y, "both", radius)

    for _ in range(200):
        again, slope = loss_and_gradient(z, y, "both", radius)
        assert torch.equal(again, loss)
        assert torch.equal(slope, gradient)


@pytest.mark.parametrize("radius", [1, 2])
def test_a_graph_replays_with_another_seed_and_image(radius: int) -> None:
    z, y = case((4, 1, 128, 128))
    seed = torch.tensor(1, device="cuda")
    static = z.clone().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss = perturbed_boundary_loss(static, y, seed=seed, region="both", radius=radius, backend="triton")
        (gradient,) = torch.autograd.grad([loss], [static])
        return loss, gradient

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = run()
    with torch.no_grad():
        static.copy_(-z)
    seed.fill_(9)
    graph.replay()

    replayed, slope = loss.detach().clone(), gradient.clone()
    expected, expected_slope = run()
    assert torch.equal(replayed, expected)
    assert torch.equal(slope, expected_slope)


def test_nothing_waits_for_the_gpu() -> None:
    z, y = case((4, 1, 128, 128))
    soft = y.float()
    loss_and_gradient(z, soft, "both")  # compiles

    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradient(z, soft, "both")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_target_outside_0_to_1_makes_the_loss_nan() -> None:
    z, y = case((2, 1, 64, 64))
    y[1, 0, 3, 5] = 2

    loss, parts = perturbed_boundary_loss(z, y, seed=1, return_parts=True, backend="triton")

    assert torch.isnan(loss)
    assert torch.isnan(parts.clean).tolist() == [False, True]


def test_more_than_two_to_the_31_voxels() -> None:
    """The last sample alone has a region, beyond offsets and noise counters of 32 bits."""
    side, batch = 8192, 33  # 2.2e9 voxels
    if torch.cuda.mem_get_info()[0] < 14 * side * side * batch // 2:
        pytest.skip("needs 15 GB of free memory")
    z = torch.full((batch, 1, side, side), -4.0, dtype=torch.bfloat16, device="cuda")
    y = torch.zeros(z.shape, dtype=torch.uint8, device="cuda")
    z[-1, 0, -64:, -64:] = 4.0
    recipe = Recipe("both", 1, "square", 0.75, 0.5, 0.5, 1e-5)
    seed = torch.tensor(3, device="cuda")

    found = forward(z, y, seed, recipe)
    loss, gradient = loss_and_gradient(z, y, "both")

    corner, target = z[-1:, :, -80:, -80:].float().cpu(), y[-1:, :, -80:, -80:].cpu()
    expected = reference.perturb(corner, target, torch.tensor(3), recipe).region
    assert found.voxels.tolist() == [0] * (batch - 1) + [int(expected.sum())]
    assert torch.isfinite(loss)
    assert gradient[-1, 0, -1, -1] > 0
    assert np.isclose(float(found.clean[0]), float(found.clean[1]))
