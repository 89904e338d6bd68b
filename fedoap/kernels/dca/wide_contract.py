"""Gradients of tokens in the wide route: five products of one launch.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head. With weights P and gradients
of logits S, both (B, H, N, columns) as in `wide_forward`, P times the gate where gated:

    bank keys, values   scale sum over b of S^T q, sum over b of P^T dout    sum over (b, n)
    queries             scale S [k ; bank_k]                                sum over (l, m)
    local keys, values  scale S^T q, P^T dout                               sum over n

One program sums all of one tile of a result in a fixed order: no atomics, no partial results, no bit that
depends on the card. The longest sums come first, so that the short ones fill what they leave idle.
"""

import triton
import triton.language as tl
from torch import Tensor

from fedoap.kernels.dca.wide_chunks import Backward
from fedoap.kernels.dca.wide_forward import in_elements
from fedoap.kernels.dca.wide_strides import in_units, unit
from fedoap.kernels.dca.wide_tiles import Tiles, dot_precision
from fedoap.kernels.sizes import cdiv


@triton.jit
def _transposed(
    left_ptr, x_ptr, column, x_b, x_h, x_n, h, first, last, heads, rows, width, key, keys, channel, acc,
    D: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc plus left^T x over batch elements first to last and all their rows."""
    inner = tl.arange(0, INNER)
    steps = tl.cdiv(rows, INNER)
    for step in range(first * steps, last * steps):
        b = (step // steps).to(tl.int64)
        row = (step % steps) * INNER + inner
        live = row < rows
        left_at = left_ptr + ((b * heads + h) * rows + row)[None, :] * width + (column + key)[:, None]
        x_at = x_ptr + b * x_b + h * x_h + row.to(tl.int64)[:, None] * x_n + channel[None, :]
        left = tl.load(left_at, mask=live[None, :] & (key < keys)[:, None], other=0.0)
        if D % COLUMNS == 0:
            x = tl.load(x_at, mask=live[:, None], other=0.0)
        else:
            x = tl.load(x_at, mask=live[:, None] & (channel < D)[None, :], other=0.0)
        acc = tl.dot(left, x, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def _query_gradient(
    slopes_ptr, k_ptr, bank_ptr, k_start, bank_start, k_n, bank_n, row, rows, length, slots, bank_column, width,
    channel, acc,
    D: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return acc plus slopes @ keys over the keys of both sources."""
    inner = tl.arange(0, INNER)
    slopes_at = slopes_ptr + row.to(tl.int64)[:, None] * width + inner[None, :]
    local_steps = tl.cdiv(length, INNER)
    for step in range(local_steps + tl.cdiv(slots, INNER)):
        is_local = step < local_steps
        start = tl.where(is_local, step, step - local_steps) * INNER
        key = start + inner
        live = key < tl.where(is_local, length, slots)
        k_at = tl.where(is_local, k_ptr, bank_ptr) + tl.where(is_local, k_start, bank_start)
        k_at += key.to(tl.int64)[:, None] * tl.where(is_local, k_n, bank_n)
        column = start + tl.where(is_local, 0, bank_column)
        slopes = tl.load(slopes_at + column, mask=(row < rows)[:, None], other=0.0)
        if D % COLUMNS == 0:
            k = tl.load(k_at + channel[None, :], mask=live[:, None], other=0.0)
        else:
            k = tl.load(k_at + channel[None, :], mask=live[:, None] & (channel < D)[None, :], other=0.0)
        acc = tl.dot(slopes, k, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit(
    do_not_specialize=[
        "bank_keys", "bank_values", "query", "local_keys", "batch", "heads", "rows", "length", "slots",
        "local_tiles", "tiles", "phase",
    ]
)  # fmt: skip
def contract_kernel(  # noqa: PLR0915 - one launch for all products keeps a GPU full
    slopes_ptr, weights_ptr, q_ptr, dout_ptr, k_ptr, bank_ptr,
    dq_ptr, dk_ptr, dv_ptr, dbank_k_ptr, dbank_v_ptr, local_sum_ptr, bank_sum_ptr,
    q_b, q_h, q_n, dout_b, dout_h, dout_n, k_b, k_h, k_n, bank_h, bank_n, dq_b, dq_h, dq_n,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, dbank_k_h, dbank_k_n, dbank_v_h, dbank_v_n, bank_sum_s,
    bank_keys, bank_values, query, local_keys, batch, heads, rows, length, slots, local_tiles, tiles, scale, phase,
    D: tl.constexpr, UNIT: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one tile of one gradient.

    The first `bank_keys` programs make the bank keys', the next `bank_values` the bank values', and so on.
    Where there is memory for sums over queries, bits of `phase` tell what to do with them: 1 go on with
    local ones, 2 finish them, 4 go on with the bank's, 8 finish them.
    """
    WIDE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    SLICES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    width = tiles * KEYS
    of_bank = bank_keys + bank_values
    q_b, q_h, q_n = in_elements(q_b, q_h, q_n, UNIT)
    dout_b, dout_h, dout_n = in_elements(dout_b, dout_h, dout_n, UNIT)
    k_b, k_h, k_n = in_elements(k_b, k_h, k_n, UNIT)
    _, bank_h, bank_n = in_elements(0, bank_h, bank_n, UNIT)
    dq_b, dq_h, dq_n = in_elements(dq_b, dq_h, dq_n, UNIT)
    dk_b, dk_h, dk_n = in_elements(dk_b, dk_h, dk_n, UNIT)
    dv_b, dv_h, dv_n = in_elements(dv_b, dv_h, dv_n, UNIT)
    _, dbank_k_h, dbank_k_n = in_elements(0, dbank_k_h, dbank_k_n, UNIT)
    _, dbank_v_h, dbank_v_n = in_elements(0, dbank_v_h, dbank_v_n, UNIT)
    if (program >= of_bank) & (program < of_bank + query):
        index = program - of_bank
        channel = (index % SLICES) * COLUMNS + tl.arange(0, COLUMNS)
        blocks = tl.cdiv(rows, ROWS)
        row = (index // SLICES) % blocks * ROWS + tl.arange(0, ROWS)
        bh = (index // SLICES // blocks).to(tl.int64)
        b, h = bh // heads, bh % heads
        dq = _query_gradient(
            slopes_ptr + bh * rows * width, k_ptr, bank_ptr, b * k_b + h * k_h, h * bank_h, k_n, bank_n,
            row, rows, length, slots, local_tiles * KEYS, width, channel, tl.zeros([ROWS, COLUMNS], WIDE),
            D, COLUMNS, INNER, PRECISION,
        )  # fmt: skip
        at = b * dq_b + h * dq_h + row.to(tl.int64)[:, None] * dq_n + channel[None, :]
        live = (row < rows)[:, None] & (channel < D)[None, :]
        tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=live)
    else:
        is_bank = program < of_bank
        index = tl.where(is_bank, program, program - of_bank - query)
        first_values = tl.where(is_bank, bank_keys, local_keys)
        is_key = index < first_values
        index = tl.where(is_key, index, index - first_values)
        keys = tl.where(is_bank, slots, length)
        blocks = tl.cdiv(keys, ROWS)
        channel = (index % SLICES) * COLUMNS + tl.arange(0, COLUMNS)
        key = (index // SLICES) % blocks * ROWS + tl.arange(0, ROWS)
        owner = (index // SLICES // blocks).to(tl.int64)  # a head of the bank, or a head of one batch element
        b, h = tl.where(is_bank, 0, owner // heads), tl.where(is_bank, owner, owner % heads)
        in_row = (channel < D)[None, :]
        if bank_sum_ptr is not None:
            sum_ptr = tl.where(is_bank, bank_sum_ptr, local_sum_ptr) + tl.where(is_bank, owner * slots * D, 0)
            sum_ptr += tl.where(is_key, 0, tl.where(is_bank, bank_sum_s, length.to(tl.int64) * D))
            sum_at = sum_ptr + key.to(tl.int64)[:, None] * D + channel[None, :]
            known = tl.where((phase & tl.where(is_bank, 4, 1)) != 0, keys, 0)
            acc = tl.load(sum_at, mask=(key < known)[:, None] & in_row, other=0.0)
        else:
            acc = tl.zeros([ROWS, COLUMNS], WIDE)
        acc = _transposed(
            tl.where(is_key, slopes_ptr, weights_ptr), tl.where(is_key, q_ptr, dout_ptr),
            tl.where(is_bank, local_tiles * KEYS, 0),
            tl.where(is_key, q_b, dout_b), tl.where(is_key, q_h, dout_h), tl.where(is_key, q_n, dout_n),
            h, b.to(tl.int32), tl.where(is_bank, batch, b + 1).to(tl.int32), heads, rows, width, key, keys, channel,
            acc, D, COLUMNS, INNER, PRECISION,
        )  # fmt: skip
        d_n = tl.where(is_bank, tl.where(is_key, dbank_k_n, dbank_v_n), tl.where(is_key, dk_n, dv_n))
        d_start = tl.where(
            is_bank,
            tl.where(is_key, h * dbank_k_h, h * dbank_v_h),
            tl.where(is_key, b * dk_b + h * dk_h, b * dv_b + h * dv_h),
        )
        d_ptr = tl.where(
            is_bank, tl.where(is_key, dbank_k_ptr, dbank_v_ptr), tl.where(is_key, dk_ptr, dv_ptr)
        )  # fmt: skip
        d_at = d_ptr + d_start + key.to(tl.int64)[:, None] * d_n + channel[None, :]
        result = tl.where(is_key, acc * scale, acc).to(dq_ptr.dtype.element_ty)
        if bank_sum_ptr is not None:
            ends = (phase & tl.where(is_bank, 8, 2)) != 0
            tl.store(sum_at, acc, mask=(key < tl.where(ends, 0, keys))[:, None] & in_row)
            keys = tl.where(ends, keys, 0)
        tl.store(d_at, result, mask=(key < keys)[:, None] & in_row)


@triton.jit(do_not_specialize=["parts", "columns"])
def column_sum_kernel(parts_ptr, total_ptr, parts, columns, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the sum of parts (parts, columns), `PARTS` at a time."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], total_ptr.dtype.element_ty)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        live = (part < parts)[:, None] & (column < columns)[None, :]
        at = part.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.sum(tl.load(parts_ptr + at, mask=live, other=0.0), 0)
    tl.store(total_ptr + column, total, mask=column < columns)


def contract(part: Backward, slopes: Tensor, weights: Tensor | None, phase: int, tiles: Tiles) -> None:
    """Fill the gradients of the tokens, those that are not None; `phase` is a chunk's."""
    problem, dout, got, local_sum, bank_sum = part.problem, part.dout, part.gradients, part.local_sum, part.bank_sum
    batch, heads, queries, length, slots, channels = problem.sizes
    q, k, bank_k = problem.q, problem.k, problem.bank_k
    tile = tiles.contract.within(columns=channels)
    slices = cdiv(channels, tile.columns)
    of_bank, of_local = (slices * cdiv(keys, tile.rows) * heads for keys in (slots, length))
    counts = (
        0 if got.bank_k is None else of_bank,
        0 if got.bank_v is None else of_bank,
        0 if got.q is None else slices * cdiv(queries, tile.rows) * batch * heads,
        0 if got.k is None else of_local * batch,
        0 if got.v is None else of_local * batch,
    )
    if not sum(counts):
        return
    # what nobody wants has no programs: any tensor of its dtype stands in for it
    dq, dk, dv = (q if x is None else x for x in (got.q, got.k, got.v))
    dbank_k, dbank_v = (bank_k if x is None else x for x in (got.bank_k, got.bank_v))
    contract_kernel[(sum(counts),)](
        slopes, slopes if weights is None else weights, q, dout, k, bank_k,
        dq, dk, dv, dbank_k, dbank_v, local_sum, bank_sum,
        *in_units(q), *in_units(dout), *in_units(k), *in_units(bank_k), *in_units(dq),
        *in_units(dk), *in_units(dv), *in_units(dbank_k), *in_units(dbank_v),
        0 if bank_sum is None else bank_sum.stride(0),
        *counts[:4], batch, heads, queries, length, slots,
        tiles.count(length), tiles.count(length) + tiles.count(slots), problem.scale, phase,
        D=channels, UNIT=unit(channels), KEYS=tiles.scores.columns, ROWS=tile.rows, COLUMNS=tile.columns,
        INNER=tile.inner, PRECISION=dot_precision(problem),
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def column_sum(parts: Tensor, total: Tensor) -> None:
    """Fill total (H, M) with the sum of parts (B, blocks, H, M) over the first two axes, in their order."""
    columns = 128
    column_sum_kernel[(cdiv(total.numel(), columns),)](
        parts,
        total,
        parts.shape[0] * parts.shape[1],
        total.numel(),
        PARTS=16,
        COLUMNS=columns,
        num_warps=4,
        enable_fp_fusion=True,
    )
