"""Region and perturbed logits alone, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedoap.kernels.pbl.marching import march_of
from fedoap.kernels.pbl.noise import noise
from fedoap.kernels.pbl.packing import marks_of
from fedoap.kernels.pbl.problem import Recipe
from fedoap.kernels.pbl.region import (
    MARCHED,
    MARKED,
    as_scalar,
    edge_of,
    first_groups,
    group_of,
    plane_words,
    region_of,
    stored_group_of,
    voxels_of,
    widened,
)
from fedoap.kernels.pbl.tiles import Tiles


@triton.jit(do_not_specialize=["z_stride", "y_stride", "depth", "rows", "row_groups", "steps", "programs", "line"])
def extraction_kernel(
    z_ptr, y_ptr, marks_ptr, seed_ptr, region_ptr, noisy_ptr,
    z_stride, y_stride, depth, rows, row_groups, steps, programs, line,
    threshold: tl.float64, sigma: tl.float64,
    REGION: tl.constexpr, EDGE: tl.constexpr, CROSS: tl.constexpr, TALL: tl.constexpr, VEC: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Write region and perturbed logits of one program's voxels; strides count groups, both outputs are dense."""
    pid = tl.program_id(0)
    b = (pid // programs).to(tl.int64)
    z_ptr, y_ptr = z_ptr + b * z_stride * VEC, y_ptr + b * y_stride * VEC
    total = depth.to(tl.int64) * rows * row_groups
    region_ptr += b * total * VEC
    noisy_ptr += b * total * VEC
    group, row, place, stride, limit = first_groups(pid % programs, total, rows, row_groups, steps, EDGE, LANES)
    threshold = as_scalar(threshold, widened(tl.zeros([1], z_ptr.dtype.element_ty)))
    sigma = as_scalar(sigma, tl.zeros([1], tl.float32))
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
        word = region_of(z, y_given.to(z.dtype), y_given, edge, exists, threshold, REGION, VEC)
        noisy = z
        if tl.max(word, axis=0) > 0:
            drawn = noise(seed_ptr, b * total + group, sigma, VEC).to(z.dtype)
            noisy = tl.where(voxels_of(word, VEC), z + drawn, z)
        offset = (group * VEC)[:, None] + tl.arange(0, VEC)[None, :]
        tl.store(region_ptr + offset, voxels_of(word, VEC).to(tl.uint8), mask=exists[:, None])
        tl.store(noisy_ptr + offset, noisy, mask=exists[:, None])
        group, z, y_given = following, next_z, next_y
        if EDGE == MARCHED:
            before, near, far = far, next_near, next_far


def extract(
    logits: Tensor, target: Tensor, seed: Tensor, recipe: Recipe, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Return the region and the perturbed logits of a batch that has voxels, both dense."""
    march = march_of(logits, target, recipe, "extraction", tiles)
    marks = marks_of(march, recipe)
    region = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
    noisy = torch.empty(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    with torch.cuda.device_of(logits):
        extraction_kernel[(logits.shape[0] * march.programs,)](
            march.logits, march.target, marks, seed, region.view(torch.uint8), noisy,
            *march.sizes, march.threshold, recipe.sigma, *march.variant,
            num_warps=march.tiles.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return region, noisy
