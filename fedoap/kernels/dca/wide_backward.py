"""Backward pass of the wide route: four or five products.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head; S is 1, or 2 where gated.

    delta_kernel      delta = sum_d dout out - dlse of each softmax, and the gate's gradient
    slopes_kernel     P = 2^(s - lse), from the weights saved by `wide_forward` or made again, and
                      gradients of the logits S = P (dout v^T - delta)
    contract_kernel   gradients of all tokens from P and S, see `wide_contract`
    column_sum_kernel the slot bias's gradient from column sums of S

P and S of all queries may be large: they exist for one chunk at a time. Sums over queries go on from
chunk to chunk where they stopped, so chunking changes no bit.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedoap.kernels.dca.problem import Attended, Gradients, Problem, Wanted, unfilled_gradients
from fedoap.kernels.dca.wide_chunks import Backward, chunks
from fedoap.kernels.dca.wide_contract import column_sum, contract
from fedoap.kernels.dca.wide_forward import LOG2E, base2_logits, in_elements, logits_tile, rounded
from fedoap.kernels.dca.wide_strides import aligned_rows, in_units, inner_contiguous, unit, with_aligned_rows
from fedoap.kernels.dca.wide_tiles import Tiles, dot_precision, tiles_for
from fedoap.kernels.sizes import cdiv, next_power_of_2


@triton.jit
def _row_products(
    dout_at, out_at, row, rows, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """Return the sum over channels of dout times out, one number a row."""
    total = tl.zeros([ROWS], WIDE)
    for start in range(0, D, COLUMNS):
        channel = start + tl.arange(0, COLUMNS)
        live = (row < rows)[:, None] & (channel < D)[None, :]
        dout = tl.load(dout_at[:, None] + channel[None, :], mask=live, other=0.0).to(WIDE)
        out = tl.load(out_at[:, None] + channel[None, :], mask=live, other=0.0).to(WIDE)
        total += tl.sum(dout * out, 1)
    return total


@triton.jit(do_not_specialize=["heads", "rows"])
def delta_kernel(
    dout_ptr, out_ptr, bank_out_ptr, gate_ptr, dlse_ptr, delta_ptr, dgate_ptr,
    dout_b, dout_h, dout_n, out_b, out_h, out_n, gate_b, gate_h, gate_n, heads, rows, lse_s,
    D: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write delta (S, B, H, N) and, where wanted, the gate's gradient (B, H, N); gated, `out` is its local part."""
    WIDE: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(rows, ROWS)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    live = row < rows
    at = bh * rows + row
    dout_b, dout_h, dout_n = in_elements(dout_b, dout_h, dout_n, UNIT)
    out_b, out_h, out_n = in_elements(out_b, out_h, out_n, UNIT)
    dout_at = dout_ptr + b * dout_b + h * dout_h + row.to(tl.int64) * dout_n
    out_at = b * out_b + h * out_h + row.to(tl.int64) * out_n
    delta = _row_products(dout_at, out_ptr + out_at, row, rows, D, ROWS, COLUMNS, WIDE)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=live, other=0.0)
    tl.store(delta_ptr + at, delta, mask=live)
    if gate_ptr is not None:
        dgate = _row_products(dout_at, bank_out_ptr + out_at, row, rows, D, ROWS, COLUMNS, WIDE)
        if dgate_ptr is not None:
            tl.store(dgate_ptr + at, dgate, mask=live)
        gate_at = gate_ptr + b * gate_b + h * gate_h + row.to(tl.int64) * gate_n
        delta = dgate * tl.load(gate_at, mask=live, other=0.0)
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + lse_s + at, mask=live, other=0.0)
        tl.store(delta_ptr + lse_s + at, delta, mask=live)


@triton.jit(do_not_specialize=["bias_h", "heads", "rows", "length", "slots", "local_tiles", "tiles", "lse_s"])
def slopes_kernel(  # noqa: PLR0915 - strides take a line each
    q_ptr, k_ptr, bank_k_ptr, v_ptr, bank_v_ptr, bias_ptr, gate_ptr, dout_ptr, lse_ptr, delta_ptr,
    saved_ptr, pivots_ptr, slopes_ptr, weights_ptr, column_sums_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, bank_k_h, bank_k_n, v_b, v_h, v_n, bank_v_h, bank_v_n, bias_h,
    gate_b, gate_h, gate_n, dout_b, dout_h, dout_n, lse_s, lse_b, lse_h, saved_b, saved_h,
    pivots_b, pivots_h, pivots_t, sums_b, sums_r, sums_h,
    heads, rows, length, slots, local_tiles, tiles, scale2,
    D: tl.constexpr, UNIT: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write gradients of the logits and, where wanted, weights times gate (B, H, N, tiles PADDED) of one tile.

    Where the bias wants a gradient, also write this tile's sums over its rows (B, blocks, H, M).
    """
    WIDE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    SPLIT: tl.constexpr = PADDED // KEYS
    tile = tl.program_id(0) % (tiles * SPLIT)
    block = tl.program_id(0) // (tiles * SPLIT)
    blocks = tl.cdiv(rows, ROWS)
    bh = (block // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    row = (block % blocks) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    q_b, q_h, q_n = in_elements(q_b, q_h, q_n, UNIT)
    k_b, k_h, k_n = in_elements(k_b, k_h, k_n, UNIT)
    v_b, v_h, v_n = in_elements(v_b, v_h, v_n, UNIT)
    _, bank_k_h, bank_k_n = in_elements(0, bank_k_h, bank_k_n, UNIT)
    _, bank_v_h, bank_v_n = in_elements(0, bank_v_h, bank_v_n, UNIT)
    dout_b, dout_h, dout_n = in_elements(dout_b, dout_h, dout_n, UNIT)
    is_local = tile < local_tiles * SPLIT
    key = tl.where(is_local, tile, tile - local_tiles * SPLIT) * KEYS + tl.arange(0, KEYS)
    keys = tl.where(is_local, length, slots)
    lse_at = tl.where(is_local, 0, lse_s).to(tl.int64) + b * lse_b + h * lse_h + row
    lse = tl.load(lse_ptr + lse_at, mask=live, other=0.0)
    # a row past the last and a row with no live key weigh nothing
    lse2 = tl.where(live & (lse != -float("inf")), lse * LOG2E, float("inf"))
    if saved_ptr is not None:
        at = saved_ptr + b * saved_b + h * saved_h + row.to(tl.int64)[:, None] * (tiles * PADDED)
        at += (tile * KEYS + tl.arange(0, KEYS))[None, :]
        pivot_at = pivots_ptr + b * pivots_b + h * pivots_h + (tile // SPLIT).to(tl.int64) * pivots_t + row
        factor = tl.exp2(tl.load(pivot_at, mask=live, other=0.0) - lse2)
        weights = tl.load(at, mask=live[:, None], other=0.0).to(WIDE) * factor[:, None]
    else:
        keys_ptr = tl.where(is_local, k_ptr, bank_k_ptr) + tl.where(is_local, b * k_b + h * k_h, h * bank_k_h)
        products = logits_tile(
            q_ptr + b * q_b + h * q_h, keys_ptr,
            row, key, q_n, tl.where(is_local, k_n, bank_k_n), rows, keys, D, ROWS, KEYS, INNER, PRECISION,
        )  # fmt: skip
        if bias_ptr is not None:
            bias_ptr += h * bias_h
        weights = tl.exp2(base2_logits(products, bias_ptr, key, keys, scale2, is_local) - lse2[:, None])
    values_ptr = tl.where(is_local, v_ptr, bank_v_ptr) + tl.where(is_local, b * v_b + h * v_h, h * bank_v_h)
    dweights = logits_tile(
        dout_ptr + b * dout_b + h * dout_h, values_ptr,
        row, key, dout_n, tl.where(is_local, v_n, bank_v_n), rows, keys, D, ROWS, KEYS, INNER, PRECISION,
    )  # fmt: skip
    delta = tl.load(delta_ptr + lse_at, mask=live, other=0.0)
    gated = weights
    if gate_ptr is not None:
        gate_at = gate_ptr + b * gate_b + h * gate_h + row.to(tl.int64) * gate_n
        gate = tl.where(is_local, 1.0, tl.load(gate_at, mask=live, other=0.0))[:, None]
        gated = weights * gate
        dweights *= gate
    slopes = weights * (dweights - delta[:, None])
    at = (bh * rows + row)[:, None] * (tiles * PADDED) + (tile * KEYS + tl.arange(0, KEYS))[None, :]
    tl.store(slopes_ptr + at, rounded(slopes, slopes_ptr.dtype.element_ty, PRECISION), mask=live[:, None])
    if weights_ptr is not None:
        tl.store(weights_ptr + at, rounded(gated, weights_ptr.dtype.element_ty, PRECISION), mask=live[:, None])
    if column_sums_ptr is not None:
        at = b * sums_b + (block % blocks).to(tl.int64) * sums_r + h * sums_h + key
        tl.store(column_sums_ptr + at, tl.sum(slopes, 0), mask=key < tl.where(is_local, 0, keys))


def backward(
    problem: Problem,
    attended: Attended,
    dout: Tensor,
    dlse: Tensor | None,
    wanted: Wanted,
    tiles: Tiles | None = None,
) -> Gradients:
    """Return the gradients of sum(out * dout) + sum(lse * dlse) that are wanted."""
    tiles = tiles or tiles_for(problem)
    problem, dout = with_aligned_rows(problem), aligned_rows(inner_contiguous(dout))
    gradients = unfilled_gradients(problem, wanted)
    delta = _delta(problem, attended, dout, dlse, gradients.gate)
    if any((wanted.q, wanted.k, wanted.v, wanted.bank_k, wanted.bank_v, wanted.bias)):
        _fill(Backward(problem, attended, dout, delta, gradients), tiles)
    return gradients


def _delta(
    problem: Problem, attended: Attended, dout: Tensor, dlse: Tensor | None, dgate: Tensor | None
) -> Tensor:  # fmt: skip
    """Return delta, shaped like the log-sum-exp; fill the gate's gradient."""
    batch, heads, queries, _, _, channels = problem.sizes
    gate, lse = problem.gate, attended.lse
    out = attended.out if gate is None else attended.local_out
    assert out is not None
    delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    rows, columns = 16, max(16, min(256, next_power_of_2(channels)))
    delta_kernel[(cdiv(queries, rows) * batch * heads,)](
        dout, out, attended.bank_out, gate, None if dlse is None else dlse.contiguous(), delta, dgate,
        *in_units(dout), *in_units(out), *((0, 0, 0) if gate is None else gate.stride()),
        heads, queries, batch * heads * queries,
        D=channels, UNIT=unit(channels), ROWS=rows, COLUMNS=columns, num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    return delta


def _fill(whole: Backward, tiles: Tiles) -> None:
    """Fill the gradients of tokens and bias."""
    problem, device = whole.problem, whole.dout.device
    batch, heads, queries, length, slots, channels = problem.sizes
    row_bytes = 2 * tiles.width(length, slots) * problem.q.element_size()
    parts = list(chunks(problem, row_bytes, tiles.workspace, tiles.block))
    block_rows = tiles.slopes.rows
    if (of_bias := whole.gradients.bias) is not None:
        shape = batch, cdiv(queries, block_rows), heads, slots
        whole = replace(whole, column_sums=torch.empty(shape, dtype=problem.wide, device=device))
    if len(parts) > 1:
        local_sum = torch.empty((2, length, channels), dtype=problem.wide, device=device)
        bank_sum = torch.empty((2, heads, slots, channels), dtype=problem.wide, device=device)
        whole = replace(whole, local_sum=local_sum, bank_sum=bank_sum)
    for chunk in parts:
        part = chunk.backward(whole, block_rows)
        slopes, weights = _slopes(part, tiles)
        contract(part, slopes, weights, chunk.phase(problem), tiles)
    if of_bias is not None and whole.column_sums is not None:
        column_sum(whole.column_sums, of_bias)


def _slopes(part: Backward, tiles: Tiles) -> tuple[Tensor, Tensor | None]:
    """Return gradients of the logits and, where values want gradients, weights (B, H, N, width)."""
    problem, saved, pivots, dout, columns = (
        part.problem, part.attended.weights, part.attended.pivots, part.dout, part.column_sums
    )  # fmt: skip
    batch, heads, queries, length, slots, channels = problem.sizes
    q, k, v, bank_k, bank_v, gate = problem.q, problem.k, problem.v, problem.bank_k, problem.bank_v, problem.gate
    bias = None if problem.bias is None else inner_contiguous(problem.bias)
    tile, padded = tiles.slopes.within(inner=channels), tiles.scores.columns
    count = tiles.count(length) + tiles.count(slots)
    slopes = torch.empty((batch, heads, queries, count * padded), dtype=q.dtype, device=q.device)
    of_values = part.gradients.v is not None or part.gradients.bank_v is not None
    weights = torch.empty_like(slopes) if of_values else None
    programs = count * (padded // tile.columns) * cdiv(queries, tile.rows) * batch * heads
    if programs:
        slopes_kernel[(programs,)](
            q, k, bank_k, v, bank_v, bias, gate, dout, part.attended.lse, part.delta,
            saved, pivots, slopes, weights, columns,
            *in_units(q), *in_units(k), *in_units(bank_k), *in_units(v), *in_units(bank_v),
            0 if bias is None else bias.stride(0), *((0, 0, 0) if gate is None else gate.stride()),
            *in_units(dout), *((0, *part.delta.stride()[:2]) if gate is None else part.delta.stride()[:3]),
            *((0, 0) if saved is None else saved.stride()[:2]), *((0, 0, 0) if pivots is None else pivots.stride()[:3]),
            *((0, 0, 0) if columns is None else columns.stride()[:3]),
            heads, queries, length, slots, tiles.count(length), count, problem.scale * LOG2E.value,
            D=channels, UNIT=unit(channels), PADDED=padded, ROWS=tile.rows, KEYS=tile.columns, INNER=tile.inner,
            PRECISION=dot_precision(problem), num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return slopes, weights
