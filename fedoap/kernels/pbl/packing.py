"""Bands of any radius but 1: both sides of z > 0 as one bit a voxel, dilated by one step `radius` times.

A word holds 32 voxels of a row, so a step costs a 32nd of a pass over the logits and the whole grows
with the radius alone, not with its square or cube. Bits beyond a row's end begin as 0; what grows into
them and back takes no fewer steps than along the border, so nothing comes in from there. The band that
remains is kept for the backward pass, a bit a voxel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedoap.kernels.pbl.marching import March
from fedoap.kernels.pbl.problem import Recipe
from fedoap.kernels.pbl.region import MARKED, widened

_WORDS = 64
_WARPS = 4


@triton.jit(do_not_specialize=["z_stride", "lines", "line", "width", "n_words"])
def pack_kernel(z_ptr, sides_ptr, z_stride, lines, line, width, n_words, WORDS: tl.constexpr):
    """Write the words of z > 0 and of its complement, (2, B, lines, line); `z_stride` counts voxels."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    exists = word < n_words
    column = (word % line * 32)[:, None] + tl.arange(0, 32)[None, :]
    start = word // line // lines * z_stride + word // line % lines * width
    inside = exists[:, None] & (column < width)
    z = widened(tl.load(z_ptr + start[:, None] + column, mask=inside, other=0.0))
    bit = tl.full([1, 32], 1, tl.int32) << tl.arange(0, 32)[None, :]
    tl.store(sides_ptr + word, tl.sum(tl.where(inside & (z > 0), bit, 0), axis=1), mask=exists)
    outside = tl.sum(tl.where(inside & ((z > 0) == 0), bit, 0), axis=1)
    tl.store(sides_ptr + n_words + word, outside, mask=exists)


@triton.jit
def _word(ptr, index, mask):
    return tl.load(ptr + index, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _widened_row(ptr, index, exists, column, line):
    """Return a row's words OR'ed with their neighbours to the left and to the right."""
    own = _word(ptr, index, exists)
    before = _word(ptr, index - 1, exists & (column > 0))
    after = _word(ptr, index + 1, exists & (column < line - 1))
    return own | (own << 1) | (own >> 1) | (before >> 31) | (after << 31)


@triton.jit
def _grown(ptr, index, exists, plane, row, column, depth, rows, line, CROSS: tl.constexpr, TALL: tl.constexpr):
    """Return the words dilated by one step."""
    grown = _widened_row(ptr, index, exists, column, line)
    line = line.to(tl.int64)
    for up in tl.static_range(-1, 2):
        for aside in tl.static_range(-1, 2):
            # an image has planes of one row; a cross has no corners
            if (up != 0 or aside != 0) and (TALL or aside == 0) and (not CROSS or up == 0 or aside == 0):
                there = exists & (plane + up >= 0) & (plane + up < depth) & (row + aside >= 0) & (row + aside < rows)
                other = index + (up * rows + aside) * line
                if CROSS:
                    grown |= _word(ptr, other, there)
                else:
                    grown |= _widened_row(ptr, other, there, column, line)
    return grown


@triton.jit(do_not_specialize=["depth", "rows", "line", "n_words"])
def grow_kernel(
    sides_ptr, out_ptr, depth, rows, line, n_words,
    CROSS: tl.constexpr, TALL: tl.constexpr, LAST: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Write both sides dilated by one step; in the last step, what they share: the band, (B, lines, line)."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    exists = word < n_words
    column = word % line
    row = word // line % rows
    plane = word // line // rows % depth
    inside = _grown(sides_ptr, word, exists, plane, row, column, depth, rows, line, CROSS, TALL)
    outside = _grown(sides_ptr + n_words, word, exists, plane, row, column, depth, rows, line, CROSS, TALL)
    if LAST:
        tl.store(out_ptr + word, (inside & outside).to(tl.int32, bitcast=True), mask=exists)
    else:
        tl.store(out_ptr + word, inside.to(tl.int32, bitcast=True), mask=exists)
        tl.store(out_ptr + n_words + word, outside.to(tl.int32, bitcast=True), mask=exists)


def marks_of(march: March, recipe: Recipe) -> Tensor:
    """Return the band's words, int32 (B, lines, line); none where kernels find the band themselves."""
    if march.edge != MARKED.value:
        return march.logits.new_empty(0, dtype=torch.int32)
    z, line, lines = march.logits, march.line, march.depth * march.rows
    shape = (z.shape[0], lines, line)
    if recipe.radius == 0:  # a window of one voxel never meets both sides
        return z.new_zeros(shape, dtype=torch.int32)
    n_words, width = z.shape[0] * lines * line, march.row_groups * march.vec
    grid = (-(-n_words // _WORDS),)
    sides, spare = z.new_empty((2, 2, *shape), dtype=torch.int32)
    marks = z.new_empty(shape, dtype=torch.int32)
    with torch.cuda.device_of(z):
        stride = march.sizes[0] * march.vec
        pack_kernel[grid](
            z, sides, stride, lines, line, width, n_words, _WORDS, num_warps=_WARPS, enable_fp_fusion=True
        )
        for step in range(1, recipe.radius + 1):
            last = step == recipe.radius
            grow_kernel[grid](
                sides, marks if last else spare, march.depth, march.rows, line, n_words,
                march.cross, march.rows > 1, last, _WORDS, num_warps=_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
            sides, spare = spare, sides
    return marks
