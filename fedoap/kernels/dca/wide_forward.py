"""Forward pass of the wide route: two products, the weights between them in memory.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.

Where D is large, an output row does not fit into registers, and the weights are smaller than what they
average. `scores_kernel` writes un-normalised weights, `average_kernel` normalises and averages values:

    columns of the weights    | local keys, padded to tiles | bank slots, padded to tiles |
    one tile                  2^(s - pivot), pivot = max s of the row in this tile, rounded up
    one row of the output     sum over tiles of 2^(pivot - top) weights @ values, over its total

Pivots are whole numbers, so 2^(pivot - top) scales 16-bit weights without a second rounding. Columns of
padding hold 0. Logits and log-sum-exp are base 2 inside, natural outside.
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedoap.kernels.dca.problem import Attended, Problem, unfilled
from fedoap.kernels.dca.wide_chunks import chunks
from fedoap.kernels.dca.wide_strides import in_units, inner_contiguous, unit, with_aligned_rows
from fedoap.kernels.dca.wide_tiles import Tiles, dot_precision, tiles_for
from fedoap.kernels.sizes import cdiv

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


@triton.jit
def in_elements(b, h, n, UNIT: tl.constexpr):
    """Return strides that came in units: a compiler that knows the unit loads as many elements at a time."""
    unit = tl.full([], UNIT, tl.int64)
    return b * unit, h * unit, n * unit


@triton.jit
def logits_tile(
    q_ptr, k_ptr, row, key, q_stride, k_stride, rows, keys,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return q k^T of one tile, 0 outside of rows and keys."""
    WIDE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    inner = tl.arange(0, INNER)
    q_at = q_ptr + row.to(tl.int64)[:, None] * q_stride + inner[None, :]
    k_at = k_ptr + key.to(tl.int64)[None, :] * k_stride + inner[:, None]
    live_row, live_key = (row < rows)[:, None], (key < keys)[None, :]
    products = tl.zeros([ROWS, KEYS], WIDE)
    for d in range(0, D, INNER):
        if D % INNER == 0:
            q = tl.load(q_at + d, mask=live_row, other=0.0)
            k = tl.load(k_at + d, mask=live_key, other=0.0)
        else:
            q = tl.load(q_at + d, mask=live_row & (d + inner < D)[None, :], other=0.0)
            k = tl.load(k_at + d, mask=live_key & (d + inner < D)[:, None], other=0.0)
        products = tl.dot(q, k, products, input_precision=PRECISION, out_dtype=WIDE)
    return products


@triton.jit
def base2_logits(products, bias_ptr, key, keys, scale2, is_local):
    """Return scaled products plus bias in base 2, -inf past the last key."""
    logits = products * scale2
    if bias_ptr is not None:
        logits += (tl.load(bias_ptr + key, mask=key < tl.where(is_local, 0, keys), other=0.0) * LOG2E)[None, :]
    return tl.where((key < keys)[None, :], logits, -float("inf"))


@triton.jit
def rounded(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return x in a dtype; float32 for tf32 products rounded to what tensor cores read of it."""
    if PRECISION == "tf32":
        # tensor cores cut the lowest 13 bits off: rounded here, sums of products lose their bias towards 0
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit(do_not_specialize=["bias_h", "heads", "rows", "length", "slots", "local_tiles", "tiles"])
def scores_kernel(
    q_ptr, k_ptr, bank_ptr, bias_ptr, weights_ptr, pivots_ptr, sums_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, bank_h, bank_n, bias_h,
    heads, rows, length, slots, local_tiles, tiles, scale2,
    D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the weights (B, H, N, tiles KEYS) of one tile, its pivots and row sums (B, H, tiles, N)."""
    # tiles of one block of rows are neighbours, so that its queries are read from memory once
    tile = tl.program_id(0) % tiles
    block = tl.program_id(0) // tiles
    blocks = tl.cdiv(rows, ROWS)
    bh = (block // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    row = (block % blocks) * ROWS + tl.arange(0, ROWS)
    is_local = tile < local_tiles
    q_b, q_h, q_n = in_elements(q_b, q_h, q_n, UNIT)
    k_b, k_h, k_n = in_elements(k_b, k_h, k_n, UNIT)
    _, bank_h, bank_n = in_elements(0, bank_h, bank_n, UNIT)
    key = tl.where(is_local, tile, tile - local_tiles) * KEYS + tl.arange(0, KEYS)
    keys = tl.where(is_local, length, slots)
    # a choice of pointers that are not arguments themselves does not compile for AMD in Triton 3.6
    keys_ptr = tl.where(is_local, k_ptr, bank_ptr) + tl.where(is_local, b * k_b + h * k_h, h * bank_h)
    products = logits_tile(
        q_ptr + b * q_b + h * q_h, keys_ptr,
        row, key, q_n, tl.where(is_local, k_n, bank_n), rows, keys, D, ROWS, KEYS, INNER, PRECISION,
    )  # fmt: skip
    if bias_ptr is not None:
        bias_ptr += h * bias_h
    logits = base2_logits(products, bias_ptr, key, keys, scale2, is_local)
    pivot = tl.ceil(tl.max(logits, 1))
    weights = tl.exp2(logits - tl.where(pivot == -float("inf"), 0.0, pivot)[:, None])
    at = (bh * tiles + tile) * rows + row
    tl.store(pivots_ptr + at, pivot, mask=row < rows)
    tl.store(sums_ptr + at, tl.sum(weights, 1), mask=row < rows)
    at = (bh * rows + row.to(tl.int64))[:, None] * (tiles * KEYS) + (tile * KEYS + tl.arange(0, KEYS))[None, :]
    weights = rounded(weights, weights_ptr.dtype.element_ty, PRECISION)
    tl.store(weights_ptr + at, weights, mask=(row < rows)[:, None])


@triton.jit
def _totals(pivots_ptr, sums_ptr, row, rows, first, last, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Return the greatest pivot (0 where all are -inf) and the total relative to it over tiles first to last."""
    GROUP: tl.constexpr = 8
    top = tl.full([ROWS], -float("inf"), WIDE)
    total = tl.zeros([ROWS], WIDE)
    for start in range(first, last, GROUP):
        tile = start + tl.arange(0, GROUP)
        at = tile.to(tl.int64)[None, :] * rows + row[:, None]
        live = (tile < last)[None, :] & (row < rows)[:, None]
        pivots = tl.load(pivots_ptr + at, mask=live, other=-float("inf"))
        sums = tl.load(sums_ptr + at, mask=live, other=0.0)
        higher = tl.maximum(top, tl.max(pivots, 1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(top - finite) + tl.sum(sums * tl.exp2(pivots - finite[:, None]), 1)
        top = higher
    return tl.where(top == -float("inf"), 0.0, top), total


@triton.jit
def _weighted(
    weights_ptr, pivots_ptr, v_ptr, bank_ptr, v_start, bank_start, v_n, bank_n, row, channel, rows, length, slots,
    local_tiles, tiles, first, last, top,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, KEYS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return weights @ values over steps first to last, relative to 2^top; local steps come before the bank's."""
    inner = tl.arange(0, INNER)
    live = row < rows
    weights_at = weights_ptr + row.to(tl.int64)[:, None] * (tiles * KEYS) + inner[None, :]
    local_steps = tl.cdiv(length, INNER)
    acc = tl.zeros([ROWS, COLUMNS], WIDE)
    for step in range(first, last):
        # one loop over both sources: a second one would drain and fill the pipeline again
        is_local = step < local_steps
        start = tl.where(is_local, step, step - local_steps) * INNER
        column = tl.where(is_local, 0, local_tiles * KEYS) + start
        keys = tl.where(is_local, length, slots)
        key = start + inner
        v_at = tl.where(is_local, v_ptr, bank_ptr) + tl.where(is_local, v_start, bank_start)
        v_at += key.to(tl.int64)[:, None] * tl.where(is_local, v_n, bank_n)
        pivot = tl.load(pivots_ptr + (column // KEYS).to(tl.int64) * rows + row, mask=live, other=0.0)
        weights = tl.load(weights_at + column, mask=live[:, None], other=0.0)
        if D % COLUMNS == 0:
            v = tl.load(v_at + channel[None, :], mask=(key < keys)[:, None], other=0.0)
        else:
            v = tl.load(v_at + channel[None, :], mask=(key < keys)[:, None] & (channel < D)[None, :], other=0.0)
        weights = weights * tl.exp2(pivot - top).to(weights.dtype)[:, None]
        acc = tl.dot(weights, v, acc, input_precision=PRECISION, out_dtype=WIDE)
    return acc


@triton.jit(do_not_specialize=["heads", "rows", "length", "slots", "local_tiles", "tiles", "lse_s"])
def average_kernel(
    weights_ptr, pivots_ptr, sums_ptr, v_ptr, bank_ptr, gate_ptr, out_ptr, lse_ptr, local_out_ptr, bank_out_ptr,
    v_b, v_h, v_n, bank_h, bank_n, gate_b, gate_h, gate_n, out_b, out_h, out_n, lse_s, lse_b, lse_h,
    heads, rows, length, slots, local_tiles, tiles,
    D: tl.constexpr, UNIT: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one tile of the output (B, H, N, D), its parts where gated, and the natural log-sum-exp (S, B, H, N)."""
    WIDE: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    SLICES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    # slices of one block of rows are neighbours, so that its weights are read from memory once
    slice_ = tl.program_id(0) % SLICES
    block = tl.program_id(0) // SLICES
    blocks = tl.cdiv(rows, ROWS)
    bh = (block // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    row = (block % blocks) * ROWS + tl.arange(0, ROWS)
    channel = slice_ * COLUMNS + tl.arange(0, COLUMNS)
    v_b, v_h, v_n = in_elements(v_b, v_h, v_n, UNIT)
    _, bank_h, bank_n = in_elements(0, bank_h, bank_n, UNIT)
    out_b, out_h, out_n = in_elements(out_b, out_h, out_n, UNIT)
    weights_ptr += bh * rows * (tiles * KEYS)
    pivots_ptr += bh * tiles * rows
    sums_ptr += bh * tiles * rows
    v_start, bank_start = b * v_b + h * v_h, h * bank_h
    lse_ptr += b * lse_b + h * lse_h
    local_steps = tl.cdiv(length, INNER)
    steps = local_steps + tl.cdiv(slots, INNER)
    at = b * out_b + h * out_h + row.to(tl.int64)[:, None] * out_n + channel[None, :]
    live = (row < rows)[:, None] & (channel < D)[None, :]
    first_last = local_steps if gate_ptr is not None else steps
    first_tiles = local_tiles if gate_ptr is not None else tiles
    top, total = _totals(pivots_ptr, sums_ptr, row, rows, 0, first_tiles, ROWS, WIDE)
    out = _weighted(
        weights_ptr, pivots_ptr, v_ptr, bank_ptr, v_start, bank_start, v_n, bank_n, row, channel, rows, length, slots,
        local_tiles, tiles, 0, first_last, top, D, ROWS, COLUMNS, INNER, KEYS, WIDE, PRECISION,
    )  # fmt: skip
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    if slice_ == 0:
        _store_lse(lse_ptr, top, total, row, rows)
    if gate_ptr is not None:
        tl.store(local_out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=live)
        top, total = _totals(pivots_ptr, sums_ptr, row, rows, local_tiles, tiles, ROWS, WIDE)
        bank = _weighted(
            weights_ptr, pivots_ptr, v_ptr, bank_ptr, v_start, bank_start, v_n, bank_n, row, channel, rows, length,
            slots, local_tiles, tiles, local_steps, steps, top, D, ROWS, COLUMNS, INNER, KEYS, WIDE, PRECISION,
        )  # fmt: skip
        bank = bank / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(bank_out_ptr + at, bank.to(out_ptr.dtype.element_ty), mask=live)
        gate_at = gate_ptr + b * gate_b + h * gate_h + row.to(tl.int64) * gate_n
        out += tl.load(gate_at, mask=row < rows, other=0.0)[:, None] * bank
        if slice_ == 0:
            _store_lse(lse_ptr + lse_s, top, total, row, rows)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _store_lse(lse_ptr, top, total, row, rows):
    lse = tl.where(total == 0.0, -float("inf"), (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN2)
    tl.store(lse_ptr + row, lse, mask=row < rows)


def forward(problem: Problem, tiles: Tiles | None = None) -> Attended:
    """Return attention and log-sum-exp, and what backward needs besides."""
    tiles = tiles or tiles_for(problem)
    problem = with_aligned_rows(problem)
    attended = unfilled(problem)
    if tiles.keeps_weights(problem):
        weights, pivots = _launch(problem, attended, tiles)
        return replace(attended, weights=weights, pivots=pivots)
    _, _, _, length, slots, _ = problem.sizes
    row_bytes = tiles.width(length, slots) * problem.q.element_size()
    for chunk in chunks(problem, row_bytes, tiles.workspace, tiles.block):
        _launch(chunk.problem(problem), chunk.attended(attended), tiles)
    return attended


def _launch(problem: Problem, attended: Attended, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Fill `attended`; return the weights and pivots."""
    weights, pivots, sums = _score(problem, tiles)
    batch, heads, queries, length, slots, channels = problem.sizes
    out, lse, v, bank_v, gate = attended.out, attended.lse, problem.v, problem.bank_v, problem.gate
    tile = tiles.average.within(columns=channels)
    programs = cdiv(channels, tile.columns) * cdiv(queries, tile.rows) * batch * heads
    average_kernel[(programs,)](
        weights, pivots, sums, v, bank_v, gate, out, lse, attended.local_out, attended.bank_out,
        *in_units(v), *in_units(bank_v), *((0, 0, 0) if gate is None else gate.stride()), *in_units(out),
        *((0, *lse.stride()[:2]) if gate is None else lse.stride()[:3]),
        heads, queries, length, slots, tiles.count(length), tiles.count(length) + tiles.count(slots),
        D=channels, UNIT=unit(channels), KEYS=tiles.scores.columns, ROWS=tile.rows, COLUMNS=tile.columns,
        INNER=tile.inner, PRECISION=dot_precision(problem),
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return weights, pivots


def _score(problem: Problem, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights (B, H, N, width), pivots and sums (B, H, tiles, N)."""
    batch, heads, queries, length, slots, channels = problem.sizes
    q, k, bank_k = problem.q, problem.k, problem.bank_k
    bias = None if problem.bias is None else inner_contiguous(problem.bias)
    tile, local_tiles = tiles.scores.within(inner=channels), tiles.count(length)
    count = local_tiles + tiles.count(slots)
    weights = torch.empty((batch, heads, queries, count * tile.columns), dtype=q.dtype, device=q.device)
    pivots, sums = (torch.empty((batch, heads, count, queries), dtype=problem.wide, device=q.device) for _ in range(2))
    if count:
        scores_kernel[(count * cdiv(queries, tile.rows) * batch * heads,)](
            q, k, bank_k, bias, weights, pivots, sums,
            *in_units(q), *in_units(k), *in_units(bank_k), 0 if bias is None else bias.stride(0),
            heads, queries, length, slots, local_tiles, count, problem.scale * LOG2E.value,
            D=channels, UNIT=unit(channels), ROWS=tile.rows, KEYS=tile.columns, INNER=tile.inner,
            PRECISION=dot_precision(problem), num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return weights, pivots, sums
