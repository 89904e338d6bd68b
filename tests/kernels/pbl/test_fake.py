"""The loss on fake tensors of a GPU: shapes, dtypes and strides without one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fedoap.kernels import perturbed_boundary, perturbed_boundary_loss
from fedoap.kernels.pbl import op

OPTIONS = ("band", 3, "square", 0.75, 0.1, 0.1, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 1, 6, 40), (2, 1, 3, 6, 40)])
def test_fakes_of_a_gpu_know_what_kernels_return(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with FakeTensorMode():
        z = torch.zeros(shape, dtype=dtype, device="cuda")
        y = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        seed = torch.zeros((), dtype=torch.int64, device="cuda")

        loss, parts = perturbed_boundary_loss(z, y, seed=seed, region="band", radius=3, return_parts=True)
        found = op.pbl_forward(z, y, seed, *OPTIONS)
        gradient = op.pbl_backward(loss, z, y, seed, *found[4:], *OPTIONS)  # autograd itself would ask a driver
        made = perturbed_boundary(z, y, seed=1)

    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "cuda")
    assert (gradient.shape, gradient.dtype, gradient.stride()) == (shape, dtype, z.stride())
    assert (parts.voxels.shape, parts.voxels.dtype) == ((2,), torch.int64)
    assert (made.region.dtype, made.logits.dtype) == (torch.bool, torch.float32)


def test_a_wide_band_is_kept_as_a_bit_a_voxel() -> None:
    with FakeTensorMode():
        z = torch.zeros(2, 1, 6, 40, device="cuda")
        marks = op.pbl_forward(z, z, torch.zeros((), dtype=torch.int64), "band", 2, "square", 0.75, 0.1, 0.1, 1.0)[5]

    assert (marks.shape, marks.dtype) == ((2, 6, 2), torch.int32)
