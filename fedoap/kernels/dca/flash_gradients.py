"""Kernels of the flash route that multiply matrices for the gradients; `flash_backward` launches them.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head. "Statistics" are
planes (B, H, N padded) of base 2 log-sum-exp and delta; where gated those of the bank and the gate follow.
Rows of padding have a log-sum-exp of inf, hence no weight, and 0 else.
"""

import triton
import triton.language as tl

from fedoap.kernels.dca.flash_forward import LOG2E, base2_logits, block_of, cells, load_rows

PADDING = tl.constexpr(128)
"""Rows of statistics are padded to a multiple of this, and blocks of queries divide it."""


@triton.jit
def plane_size(images, heads, queries):
    """Return the elements of one plane of statistics."""
    return tl.full([], 1, tl.int64) * images * heads * (tl.cdiv(queries, PADDING) * PADDING)


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, gate, k_ptr, v_ptr, bias_ptr, k_cells, v_cells, key, keys, scale2,
    WHOLE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dq, not scaled yet, with one more block of keys."""
    WIDE: tl.constexpr = dq.dtype
    k = load_rows(k_ptr, k_cells, key, keys, WHOLE, D, BLOCK_D)
    s = base2_logits(q, k, bias_ptr, key, keys, scale2, WHOLE, PRECISION, WIDE)
    p = tl.exp2(s - lse[:, None])
    v = load_rows(v_ptr, v_cells, key, keys, WHOLE, D, BLOCK_D)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=WIDE)
    if gate is not None:
        dp *= gate[:, None]
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=WIDE)


@triton.jit
def _dq_over_keys(
    dq, q, dout, lse, delta, gate, k_ptr, v_ptr, bias_ptr, k_stride, v_stride, keys, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dq with all keys of one source."""
    inner, step = tl.arange(0, KEYS), tl.full([], KEYS, tl.int64)
    k_cells, v_cells = cells(inner, k_stride, BLOCK_D), cells(inner, v_stride, BLOCK_D)
    whole = keys // KEYS * KEYS
    for first in tl.range(0, whole, KEYS):
        dq = _dq_step(
            dq, q, dout, lse, delta, gate, k_ptr, v_ptr, bias_ptr, k_cells, v_cells, first + inner, keys, scale2,
            True, D, BLOCK_D, PRECISION,
        )  # fmt: skip
        k_ptr += step * k_stride
        v_ptr += step * v_stride
    if whole < keys:
        dq = _dq_step(
            dq, q, dout, lse, delta, gate, k_ptr, v_ptr, bias_ptr, k_cells, v_cells, whole + inner, keys, scale2,
            False, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=["bias_h", "batch", "heads", "queries", "length", "slots"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, bank_k_ptr, bank_v_ptr, bias_ptr, dout_ptr, stats_ptr, dq_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bank_k_h, bank_k_m, bank_v_h, bank_v_m, dout_b, dout_h, dout_n,
    dq_b, dq_h, dq_n, bias_h, batch, heads, queries, length, slots, scale, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one block of queries."""
    WIDE: tl.constexpr = stats_ptr.dtype.element_ty
    b, h, first = block_of(tl.program_id(0), batch, queries, QUERIES)
    row = first + tl.arange(0, QUERIES)
    plane = plane_size(batch, heads, queries)
    at = stats_ptr + plane_size(b * heads + h, 1, queries) + row
    q = load_rows(q_ptr + b * q_b + h * q_h, cells(row, q_n, BLOCK_D), row, queries, False, D, BLOCK_D)
    dout = load_rows(dout_ptr + b * dout_b + h * dout_h, cells(row, dout_n, BLOCK_D), row, queries, False, D, BLOCK_D)
    lse, delta, gate = tl.load(at), tl.load(at + plane), None
    dq = tl.zeros([QUERIES, BLOCK_D], WIDE)
    dq = _dq_over_keys(
        dq, q, dout, lse, delta, None, k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h, None,
        k_n, v_n, length, scale2, D, BLOCK_D, KEYS, PRECISION,
    )  # fmt: skip
    if GATED:
        lse, delta, gate = tl.load(at + 2 * plane), tl.load(at + 3 * plane), tl.load(at + 4 * plane)
    dq = _dq_over_keys(
        dq, q, dout, lse, delta, gate, bank_k_ptr + h * bank_k_h, bank_v_ptr + h * bank_v_h,
        bias_ptr if bias_ptr is None else bias_ptr + h * bias_h, bank_k_m, bank_v_m, slots, scale2,
        D, BLOCK_D, KEYS, PRECISION,
    )  # fmt: skip
    mask = (row < queries)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    dq_at = b * dq_b + h * dq_h + cells(row, dq_n, BLOCK_D)
    tl.store(dq_ptr + dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dkv_over_queries(
    k, v, bias, q_ptr, dout_ptr, stats_ptr, q_b, q_n, dout_b, dout_n,
    h, first_image, last_image, batch, heads, queries, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return dk, not scaled yet, dv and the column sums of ds over the queries of some images, in order."""
    WIDE: tl.constexpr = stats_ptr.dtype.element_ty
    dk, dv = tl.zeros([KEYS, BLOCK_D], WIDE), tl.zeros([KEYS, BLOCK_D], WIDE)
    dbias = tl.zeros([KEYS], WIDE)
    inner = tl.arange(0, QUERIES)
    plane = plane_size(batch, heads, queries)
    blocks = tl.cdiv(queries, QUERIES)
    for block in tl.range(0, (last_image - first_image) * blocks):
        b = (first_image + block // blocks).to(tl.int64)
        first = (block % blocks) * QUERIES
        row = first + inner
        q = load_rows(q_ptr + b * q_b, cells(row, q_n, BLOCK_D), row, queries, False, D, BLOCK_D)
        # every thread reads many of these numbers: offsets from a scalar take no registers, no masks no predicates
        at = stats_ptr + plane_size(b * heads + h, 1, queries) + first
        lse = tl.load(at + inner)
        # keys x queries: p and ds stand as the products below take them
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=WIDE) * scale2
        if bias is not None:
            s += bias[:, None]
        p = tl.exp2(s - lse[None, :])
        dout = load_rows(dout_ptr + b * dout_b, cells(row, dout_n, BLOCK_D), row, queries, False, D, BLOCK_D)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION, out_dtype=WIDE)
        delta = tl.load(at + plane + inner)
        weights = p
        if GATED:
            gate = tl.load(at + 2 * plane + inner)
            dp *= gate[None, :]
            weights = p * gate[None, :]
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION, out_dtype=WIDE)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=WIDE)
        if bias is not None:
            dbias += tl.sum(ds, 1)
    return dk, dv, dbias


@triton.jit(do_not_specialize=["bias_h", "batch", "heads", "queries", "length", "slots", "bank_programs", "splits"])
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, bank_k_ptr, bank_v_ptr, bias_ptr, dout_ptr, stats_ptr,
    dk_ptr, dv_ptr, bank_dk_ptr, bank_dv_ptr, dbias_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bank_k_h, bank_k_m, bank_v_h, bank_v_m, dout_b, dout_h, dout_n,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, bias_h,
    batch, heads, queries, length, slots, bank_programs, splits, scale, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one block of slots (splits, H, M, D), or of one block of local keys."""
    pid = tl.program_id(0)
    channel = (tl.arange(0, BLOCK_D) < D)[None, :]
    if pid < bank_programs:
        blocks = tl.cdiv(slots, KEYS)
        unit = pid // blocks
        h, split = (unit % heads).to(tl.int64), (unit // heads).to(tl.int64)
        key = (pid % blocks) * KEYS + tl.arange(0, KEYS)
        k = load_rows(bank_k_ptr + h * bank_k_h, cells(key, bank_k_m, BLOCK_D), key, slots, False, D, BLOCK_D)
        v = load_rows(bank_v_ptr + h * bank_v_h, cells(key, bank_v_m, BLOCK_D), key, slots, False, D, BLOCK_D)
        bias = None
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + h * bias_h + key, mask=key < slots, other=0.0) * LOG2E
        first_image = (split * batch // splits).to(tl.int32)
        last_image = ((split + 1) * batch // splits).to(tl.int32)
        dk, dv, dbias = _dkv_over_queries(
            k, v, bias, q_ptr + h * q_h, dout_ptr + h * dout_h,
            stats_ptr + 2 * plane_size(batch, heads, queries) if GATED else stats_ptr,
            q_b, q_n, dout_b, dout_n, h, first_image, last_image, batch, heads, queries, scale2,
            D, BLOCK_D, QUERIES, KEYS, GATED, PRECISION,
        )  # fmt: skip
        at = (split * heads + h) * slots + key
        bank_at = at[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
        mask = (key < slots)[:, None] & channel
        tl.store(bank_dk_ptr + bank_at, (dk * scale).to(bank_dk_ptr.dtype.element_ty), mask=mask)
        tl.store(bank_dv_ptr + bank_at, dv.to(bank_dv_ptr.dtype.element_ty), mask=mask)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + at, dbias, mask=key < slots)
    else:
        b, h, first = block_of(pid - bank_programs, batch, length, KEYS)
        key = first + tl.arange(0, KEYS)
        k = load_rows(k_ptr + b * k_b + h * k_h, cells(key, k_n, BLOCK_D), key, length, False, D, BLOCK_D)
        v = load_rows(v_ptr + b * v_b + h * v_h, cells(key, v_n, BLOCK_D), key, length, False, D, BLOCK_D)
        image = b.to(tl.int32)
        dk, dv, dbias = _dkv_over_queries(
            k, v, None, q_ptr + h * q_h, dout_ptr + h * dout_h, stats_ptr, q_b, q_n, dout_b, dout_n,
            h, image, image + 1, batch, heads, queries, scale2, D, BLOCK_D, QUERIES, KEYS, False, PRECISION,
        )  # fmt: skip
        mask = (key < length)[:, None] & channel
        dk_at = b * dk_b + h * dk_h + cells(key, dk_n, BLOCK_D)
        dv_at = b * dv_b + h * dv_h + cells(key, dv_n, BLOCK_D)
        tl.store(dk_ptr + dk_at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
        tl.store(dv_ptr + dv_at, dv.to(dv_ptr.dtype.element_ty), mask=mask)
