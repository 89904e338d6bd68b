"""The loss's gradient in one pass, which finds region and noise again instead of having them stored.

    dL/dz = (p - y) / V + p' (a - b y)     a = (2 sum p y + smooth) / (sum p + sum y + smooth)^2
                                           b = 2 / (sum p + sum y + smooth)

for clean logits and, on the region's voxels, for noisy ones; p' = p (1 - p), V voxels of a sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedoap.kernels.pbl.marching import march_of
from fedoap.kernels.pbl.noise import noise
from fedoap.kernels.pbl.problem import Recipe
from fedoap.kernels.pbl.region import (
    MARCHED,
    MARKED,
    as_scalar,
    edge_of,
    first_groups,
    group_of,
    logistic,
    plane_words,
    region_of,
    stored_group_of,
    voxels_of,
)
from fedoap.kernels.pbl.tiles import Tiles


@triton.jit
def _miss(z, y):
    """Return sigmoid(z) - y, right in relation to its size, and the sigmoid's slope."""
    _, smaller, slope, _ = logistic(z)
    return tl.where(z >= 0, (1.0 - y) - smaller, smaller - y), slope


@triton.jit
def _factors(sums_ptr, grad_ptr, batch, volume, lam, smooth):
    """Return a sample's 1 / V, a and b for clean logits and for noisy ones, times weight and incoming gradient."""
    p, y, py = tl.load(sums_ptr), tl.load(sums_ptr + 1), tl.load(sums_ptr + 2)
    lam, smooth = as_scalar(lam, p), as_scalar(smooth, p)
    grad = tl.load(grad_ptr) / batch
    clean, noisy = grad * (1.0 - lam), grad * lam
    below = 1.0 / (p + y + smooth)
    a = clean * (2.0 * py + smooth) * below * below
    two = clean * 2.0 * below
    py += tl.load(sums_ptr + 4)
    below = 1.0 / (p + tl.load(sums_ptr + 3) + y + smooth)
    noisy_a = noisy * (2.0 * py + smooth) * below * below
    noisy_two = noisy * 2.0 * below
    volume = volume.to(p.dtype)
    return clean / volume, a, two, noisy / volume, noisy_a, noisy_two


@triton.jit(do_not_specialize=["batch", "z_stride", "y_stride", "depth", "rows", "row_groups", "steps", "programs",
                               "line"])  # fmt: skip
def backward_kernel(
    z_ptr, y_ptr, marks_ptr, seed_ptr, sums_ptr, grad_ptr, dz_ptr, batch,
    z_stride, y_stride, depth, rows, row_groups, steps, programs, line,
    threshold: tl.float64, sigma: tl.float64, lam: tl.float64, smooth: tl.float64,
    REGION: tl.constexpr, EDGE: tl.constexpr, CROSS: tl.constexpr, TALL: tl.constexpr, VEC: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one program's voxels; strides count groups, the gradient is dense."""
    pid = tl.program_id(0)
    b = (pid // programs).to(tl.int64)
    z_ptr, y_ptr = z_ptr + b * z_stride * VEC, y_ptr + b * y_stride * VEC
    total = depth.to(tl.int64) * rows * row_groups
    dz_ptr += b * total * VEC
    group, row, place, stride, limit = first_groups(pid % programs, total, rows, row_groups, steps, EDGE, LANES)
    clean, a, two, noisy, noisy_a, noisy_two = _factors(sums_ptr + b * 5, grad_ptr, batch, total * VEC, lam, smooth)
    threshold, sigma = as_scalar(threshold, clean), as_scalar(sigma, tl.zeros([1], tl.float32))
    edge = tl.zeros([LANES], tl.int32)
    if EDGE == MARCHED:
        before = plane_words(z_ptr, group - stride, total, row, place, rows, row_groups, TALL, CROSS, VEC)[1]
        near, far, z = plane_words(z_ptr, group, total, row, place, rows, row_groups, TALL, CROSS, VEC)
    else:
        z = group_of(z_ptr, group, group < limit, VEC)
    y_given = stored_group_of(y_ptr, group, group < limit, VEC)
    if EDGE == MARKED:
        marks_ptr += ((b * depth + group // stride) * rows + row) * line + place * VEC // 32
    for _ in range(steps):
        exists = group < limit
        following = group + stride  # its loads are under way while this step computes
        if EDGE == MARCHED:
            next_near, next_far, next_z = plane_words(
                z_ptr, following, total, row, place, rows, row_groups, TALL, CROSS, VEC
            )
            edge = edge_of(before | near | next_far)
        else:
            next_z = group_of(z_ptr, following, following < limit, VEC)
        next_y = stored_group_of(y_ptr, following, following < limit, VEC)
        if EDGE == MARKED:
            edge = tl.load(marks_ptr, mask=exists, other=0) >> (place * VEC % 32)
            marks_ptr += rows.to(tl.int64) * line
        y = y_given.to(z.dtype)
        word = region_of(z, y, y_given, edge, exists, threshold, REGION, VEC)
        miss, slope = _miss(z, y)
        dz = miss * (clean + noisy) + slope * ((a + noisy_a) - (two + noisy_two) * y)
        if tl.max(word, axis=0) > 0:
            drawn = noise(seed_ptr, b * total + group, sigma, VEC).to(z.dtype)
            noisy_miss, noisy_slope = _miss(z + drawn, y)
            changed = miss * clean + slope * (a - two * y)
            changed += noisy_miss * noisy + noisy_slope * (noisy_a - noisy_two * y)
            dz = tl.where(voxels_of(word, VEC), changed, dz)
        offset = (group * VEC)[:, None] + tl.arange(0, VEC)[None, :]
        tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask=exists[:, None])
        group, z, y_given = following, next_z, next_y
        if EDGE == MARCHED:
            before, near, far = far, next_near, next_far


def backward(
    grad: Tensor, logits: Tensor, target: Tensor, seed: Tensor, sums: Tensor, marks: Tensor, recipe: Recipe,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits, dense and in their dtype; `grad` is the loss's."""
    march = march_of(logits, target, recipe, "backward", tiles)
    dz = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    with torch.cuda.device_of(logits):
        backward_kernel[(logits.shape[0] * march.programs,)](
            march.logits, march.target, marks, seed, sums, grad, dz, logits.shape[0],
            *march.sizes, march.threshold, recipe.sigma, recipe.lam, recipe.smooth, *march.variant,
            num_warps=march.tiles.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dz
