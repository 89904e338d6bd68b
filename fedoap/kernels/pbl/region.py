"""The region inside a kernel, an exact function of logits and target, so every pass finds the same one.

A volume is `depth` planes of `rows` rows; an image (H, W) is H planes of one row. VEC consecutive voxels
of a row form a group, the unit of a lane. A program takes LANES groups of a plane and marches through
`steps` planes. It reads each plane once: what the band needs of a plane fits a word for each group, and the
words of three planes make the band of the middle one.

    bit k + 1        voxel k is inside, z > 0            (bits 0 and VEC + 1: the neighbours' voxels)
    bit k + 17       voxel k is outside
    no bit           beyond the border, where windows end

Dilating both sides at once is two shifts; a voxel is in the band if both of its bits are set.
"""

import triton
import triton.language as tl

ERROR = tl.constexpr(0)
BAND = tl.constexpr(1)
BOTH = tl.constexpr(2)

NO_EDGE = tl.constexpr(0)  # the region needs no band
MARCHED = tl.constexpr(1)  # radius 1: the band is found on the way
MARKED = tl.constexpr(2)  # any other radius: the band lies ready, one bit a voxel (packing.py)


@triton.jit
def widened(z):
    """Return values in the type that sums run in: float64 for float64, else float32."""
    return z if z.dtype == tl.float64 else z.to(tl.float32)


@triton.jit
def as_scalar(value, like):
    """Return an option, passed in double precision, in the type of `like`."""
    one = tl.full([], 1.0, like.dtype)  # an interpreted kernel gets options as Python floats
    return (value * one).to(like.dtype)


@triton.jit
def first_groups(t, total, rows, row_groups, steps, EDGE: tl.constexpr, LANES: tl.constexpr):
    """Return each lane's first group in its sample (int64), row, place in the row, way to its next, and the end."""
    lane = tl.arange(0, LANES)
    if EDGE == NO_EDGE:  # neighbours do not matter: a run of consecutive groups
        start = t.to(tl.int64) * steps * LANES
        group, row, place, stride, limit = start + lane, lane, lane, LANES, tl.minimum(total, start + steps * LANES)
    else:
        stride, limit = rows * row_groups, total
        lane += t * LANES
        march = lane // stride
        group = march.to(tl.int64) * steps * stride + lane % stride
        row, place = lane % stride // row_groups, lane % row_groups
    return group, row, place, stride, limit


@triton.jit
def stored_group_of(ptr, group, exists, VEC: tl.constexpr):
    """Return a group's values as they are stored, 0 where there is no group."""
    offset = (group * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    return tl.load(ptr + offset, mask=exists[:, None], other=0)


@triton.jit
def group_of(ptr, group, exists, VEC: tl.constexpr):
    """Return a group's values, widened."""
    return widened(stored_group_of(ptr, group, exists, VEC))


@triton.jit
def plane_words(z_ptr, group, total, row, place, rows, row_groups, TALL: tl.constexpr, CROSS: tl.constexpr,
                VEC: tl.constexpr):  # fmt: skip
    """Return what a plane adds to its own band and to that of planes beside it, and its logits."""
    exists = (group >= 0) & (group < total)
    z, own = _row_word(z_ptr, group, exists, place, row_groups, True, VEC)
    if CROSS:
        near = own | (own << 1) | (own >> 1)
        far = own
        if TALL:
            near |= _row_word(z_ptr, group - row_groups, exists & (row > 0), place, row_groups, False, VEC)[1]
            near |= _row_word(z_ptr, group + row_groups, exists & (row < rows - 1), place, row_groups, False, VEC)[1]
    else:
        if TALL:
            own |= _row_word(z_ptr, group - row_groups, exists & (row > 0), place, row_groups, True, VEC)[1]
            own |= _row_word(z_ptr, group + row_groups, exists & (row < rows - 1), place, row_groups, True, VEC)[1]
        near = own | (own << 1) | (own >> 1)
        far = near
    return near, far, z


@triton.jit
def _row_word(z_ptr, group, exists, place, row_groups, SIDES: tl.constexpr, VEC: tl.constexpr):
    voxel = tl.arange(0, VEC)[None, :]
    pointer = z_ptr + group * VEC
    z = group_of(z_ptr, group, exists, VEC)
    word = tl.sum(tl.where(z > 0, 2 << voxel, 131072 << voxel), axis=1)
    word = tl.where(exists, word, 0)
    if SIDES:
        beside = exists & (place > 0)
        left = widened(tl.load(pointer - 1, mask=beside, other=0.0))
        word |= tl.where(beside, tl.where(left > 0, 1, 65536), 0)
        beside = exists & (place < row_groups - 1)
        right = widened(tl.load(pointer + VEC, mask=beside, other=0.0))
        word |= tl.where(beside, tl.where(right > 0, 2 << VEC, 131072 << VEC), 0)
    return z, word


@triton.jit
def edge_of(words):
    """Return the band of a plane, bit k for voxel k, from its words OR'ed with those of the planes beside it."""
    return (words & (words >> 16)) >> 1


@triton.jit
def region_of(z, y, y_given, edge, exists, threshold, REGION: tl.constexpr, VEC: tl.constexpr):
    """Return the region, bit k for voxel k of a group: few instructions where no voxel is in it.

    `y_given` is the target as stored; a yes-or-no one errs where z or -z exceeds a threshold, free of rounding.
    """
    if REGION == BAND:
        word = edge
    else:
        if y_given.dtype.is_int():
            wrong = tl.where(y_given != 0, -z, z) > threshold
        else:
            wrong = tl.abs(logistic(z)[0] - y) > threshold
        word = tl.sum(tl.where(wrong, 1 << tl.arange(0, VEC)[None, :], 0), axis=1)
        if REGION == BOTH:
            word &= edge
    return tl.where(exists, word & ((1 << VEC) - 1), 0)


@triton.jit
def voxels_of(word, VEC: tl.constexpr):
    """Return the region voxel by voxel, (LANES, VEC)."""
    return ((word[:, None] >> tl.arange(0, VEC)[None, :]) & 1) != 0


@triton.jit
def logistic(z):
    """Return sigmoid(z), the smaller of it and 1 minus it, its slope, and exp(-|z|)."""
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(z >= 0, larger, smaller), smaller, smaller * larger, e
