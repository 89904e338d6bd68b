"""The loss in one pass over logits and target, and an ordered sum of what its programs found.

A program marches through its planes (region.py) and adds up, for each of its lanes, what clean logits
give: BCE, p, y and p y; and on the region's voxels what noise changes. Steps without such a voxel draw no
noise. The perturbed loss is the clean one plus the changes, so it costs no second pass. Sums are
written for each program and added by one program in their order: the same bits on every run.
"""

from dataclasses import dataclass

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
    logistic,
    plane_words,
    region_of,
    stored_group_of,
    voxels_of,
    widened,
)
from fedoap.kernels.pbl.tiles import FINALIZE_WARPS, Tiles, finalize_tile

_PARTIAL_SUMS = 7


@dataclass(frozen=True, slots=True)
class Found:
    """The loss and what its backward pass needs: `sums` and `marks`."""

    loss: Tensor
    clean: Tensor
    perturbed: Tensor
    voxels: Tensor
    sums: Tensor
    """(B, 5): each sample's sums of p, y and p y, then what noise adds to those of p and p y."""
    marks: Tensor
    """The band where its radius is not 1, else empty (packing.py)."""


@triton.jit
def _terms(z, y):
    """Return BCE and sigmoid."""
    p, _, _, e = logistic(z)
    if z.dtype == tl.float64:
        soft = tl.log(1.0 + e)
    else:
        # log(1 + e) = 2 atanh(s), s = e / (2 + e) <= 1/3: right to the last bits for every e, without a logarithm
        s = e / (2.0 + e)
        t = s * s
        series = 0.28174657 * t + 0.27961418
        series = series * t + 0.40024853
        series = series * t + 0.66666316
        soft = s * (series * t + 2.0)
    return tl.maximum(z, 0.0) - z * y + soft, p


@triton.jit(do_not_specialize=["z_stride", "y_stride", "depth", "rows", "row_groups", "steps", "programs", "line"])
def forward_kernel(
    z_ptr, y_ptr, marks_ptr, seed_ptr, partial_ptr, count_ptr,
    z_stride, y_stride, depth, rows, row_groups, steps, programs, line,
    threshold: tl.float64, sigma: tl.float64,
    REGION: tl.constexpr, EDGE: tl.constexpr, CROSS: tl.constexpr, TALL: tl.constexpr, VEC: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Write the sums of one program, (7, B, programs), and its voxels in the region; strides count groups."""
    pid = tl.program_id(0)
    b = (pid // programs).to(tl.int64)
    z_ptr, y_ptr = z_ptr + b * z_stride * VEC, y_ptr + b * y_stride * VEC
    total = depth.to(tl.int64) * rows * row_groups
    group, row, place, stride, limit = first_groups(pid % programs, total, rows, row_groups, steps, EDGE, LANES)
    bce_sum = widened(tl.zeros([LANES], z_ptr.dtype.element_ty))
    p_sum, y_sum, py_sum, bce_change, p_change, py_change = bce_sum, bce_sum, bce_sum, bce_sum, bce_sum, bce_sum
    count = tl.zeros([LANES], tl.int32)
    threshold, sigma = as_scalar(threshold, bce_sum), as_scalar(sigma, tl.zeros([1], tl.float32))
    edge = count
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
        fair = tl.where((y >= 0) & (y <= 1), z, float("nan"))  # nobody looked at a GPU's targets before
        bce, p = _terms(fair, y)
        bce_sum += tl.sum(tl.where(exists[:, None], bce, 0.0), axis=1)
        p_sum += tl.sum(tl.where(exists[:, None], p, 0.0), axis=1)
        y_sum, py_sum = y_sum + tl.sum(y, axis=1), py_sum + tl.sum(p * y, axis=1)
        if tl.max(word, axis=0) > 0:
            region = voxels_of(word, VEC)
            count += tl.sum(region.to(tl.int32), axis=1)
            drawn = noise(seed_ptr, b * total + group, sigma, VEC).to(z.dtype)
            noisy_bce, noisy_p = _terms(z + drawn, y)
            moved = tl.where(region, noisy_p - p, 0.0)
            bce_change += tl.sum(tl.where(region, noisy_bce - bce, 0.0), axis=1)
            p_change, py_change = p_change + tl.sum(moved, axis=1), py_change + tl.sum(moved * y, axis=1)
        group, z, y_given = following, next_z, next_y
        if EDGE == MARCHED:
            before, near, far = far, next_near, next_far
    _store(partial_ptr + pid, bce_sum, p_sum, y_sum, py_sum, bce_change, p_change, py_change)
    tl.store(count_ptr + pid, tl.sum(count, axis=0))


@triton.jit
def _store(partial_ptr, bce, p, y, py, bce_change, p_change, py_change):
    n = tl.num_programs(0)
    tl.store(partial_ptr, tl.sum(bce, axis=0))
    tl.store(partial_ptr + n, tl.sum(p, axis=0))
    tl.store(partial_ptr + 2 * n, tl.sum(y, axis=0))
    tl.store(partial_ptr + 3 * n, tl.sum(py, axis=0))
    tl.store(partial_ptr + 4 * n, tl.sum(bce_change, axis=0))
    tl.store(partial_ptr + 5 * n, tl.sum(p_change, axis=0))
    tl.store(partial_ptr + 6 * n, tl.sum(py_change, axis=0))


@triton.jit
def _column(partial_ptr, index, mask):
    return tl.load(partial_ptr + index, mask=mask, other=0.0)


@triton.jit
def _sample_loss(bce, p, y, py, volume, smooth):
    return bce / volume + (1.0 - (2.0 * py + smooth) / (p + y + smooth))


@triton.jit(do_not_specialize=["batch", "programs", "volume"])
def finalize_kernel(
    partial_ptr, count_ptr, loss_ptr, clean_ptr, perturbed_ptr, voxels_ptr, sums_ptr,
    batch, programs, volume, lam: tl.float64, smooth: tl.float64,
    SAMPLES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Write each sample's sums and losses and the mean loss; one program, so the order is fixed."""
    n = batch * programs
    loss = tl.zeros([SAMPLES], partial_ptr.dtype.element_ty)
    volume = volume.to(loss.dtype)
    lam, smooth = as_scalar(lam, loss), as_scalar(smooth, loss)
    for start in range(0, batch, SAMPLES):
        sample = (start + tl.arange(0, SAMPLES)).to(tl.int64)
        exists = sample < batch
        # reduced after the loop: Triton 3.6 aborts on a reduction in a loop whose result is used twice
        bce = tl.zeros([SAMPLES, PROGRAMS], loss.dtype)
        p, y, py, bce_change, p_change, py_change = bce, bce, bce, bce, bce, bce
        voxels = tl.zeros([SAMPLES, PROGRAMS], tl.int64)
        for first in range(0, programs, PROGRAMS):
            program = first + tl.arange(0, PROGRAMS)[None, :]
            index = sample[:, None] * programs + program
            mask = exists[:, None] & (program < programs)
            bce += _column(partial_ptr, index, mask)
            p += _column(partial_ptr + n, index, mask)
            y += _column(partial_ptr + 2 * n, index, mask)
            py += _column(partial_ptr + 3 * n, index, mask)
            bce_change += _column(partial_ptr + 4 * n, index, mask)
            p_change += _column(partial_ptr + 5 * n, index, mask)
            py_change += _column(partial_ptr + 6 * n, index, mask)
            voxels += tl.load(count_ptr + index, mask=mask, other=0)
        bce, p, y, py = tl.sum(bce, axis=1), tl.sum(p, axis=1), tl.sum(y, axis=1), tl.sum(py, axis=1)
        bce_change, p_change, py_change = (
            tl.sum(bce_change, axis=1),
            tl.sum(p_change, axis=1),
            tl.sum(py_change, axis=1),
        )
        voxels = tl.sum(voxels, axis=1)
        clean = _sample_loss(bce, p, y, py, volume, smooth)
        noisy = _sample_loss(bce + bce_change, p + p_change, y, py + py_change, volume, smooth)
        loss += tl.where(exists, (1.0 - lam) * clean + lam * noisy, 0.0)
        tl.store(clean_ptr + sample, clean, mask=exists)
        tl.store(perturbed_ptr + sample, noisy, mask=exists)
        tl.store(voxels_ptr + sample, voxels, mask=exists)
        column = sums_ptr + sample * 5
        tl.store(column, p, mask=exists)
        tl.store(column + 1, y, mask=exists)
        tl.store(column + 2, py, mask=exists)
        tl.store(column + 3, p_change, mask=exists)
        tl.store(column + 4, py_change, mask=exists)
    tl.store(loss_ptr, tl.sum(loss, axis=0) / batch)


def forward(logits: Tensor, target: Tensor, seed: Tensor, recipe: Recipe, tiles: Tiles | None = None) -> Found:
    """Return the loss of a batch that has voxels."""
    march = march_of(logits, target, recipe, "forward", tiles)
    marks = marks_of(march, recipe)
    batch, dtype, device = logits.shape[0], torch.promote_types(logits.dtype, torch.float32), logits.device
    partial = torch.empty(_PARTIAL_SUMS, batch, march.programs, dtype=dtype, device=device)
    count = torch.empty(batch, march.programs, dtype=torch.int32, device=device)
    loss, clean, perturbed, sums = (torch.empty(s, dtype=dtype, device=device) for s in ((), batch, batch, (batch, 5)))
    voxels = torch.empty(batch, dtype=torch.int64, device=device)
    with torch.cuda.device_of(logits):
        forward_kernel[(batch * march.programs,)](
            march.logits, march.target, marks, seed, partial, count,
            *march.sizes, march.threshold, recipe.sigma, *march.variant,
            num_warps=march.tiles.warps, enable_fp_fusion=True,
        )  # fmt: skip
        finalize_kernel[(1,)](
            partial, count, loss, clean, perturbed, voxels, sums,
            batch, march.programs, march.volume, recipe.lam, recipe.smooth, *finalize_tile(march.programs),
            num_warps=FINALIZE_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return Found(loss, clean, perturbed, voxels, sums, marks)
