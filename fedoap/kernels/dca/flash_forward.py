"""Forward pass of the flash route: one kernel, weights never in memory.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.

    program          one block of queries of one head of one image
    its loop         local keys, then the bank's, a block of keys at a time:

        logits       s = (q @ k^T) scale2 + bias log2(e)           scale2 = scale log2(e)
        pivot'       max(pivot, max s)                             of each row
        total'       total 2^(pivot - pivot') + sum 2^(s - pivot')
        sums'        sums 2^(pivot - pivot') + 2^(s - pivot') @ v
        at the end   out = sums / total, lse = (pivot + log2(total)) ln(2)

`gated` starts anew between local keys and bank and adds gate times the second result to the first.
Weights are rounded to v's dtype for their product; all sums are wide (`Problem.wide`). Programs of one
head follow each other whatever their image, so that they find the head's bank in the L2 cache.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from fedoap.kernels.dca import tiles as tables
from fedoap.kernels.dca.problem import Attended, Problem, unfilled
from fedoap.kernels.dca.tiles import Tiles
from fedoap.kernels.sizes import cdiv

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-1e38)
"""First pivot: below any logit but -inf, and finite, so that -inf minus a pivot is never NaN."""


@triton.jit
def block_of(pid, batch, rows, ROWS: tl.constexpr):
    """Return image, head (int64) and first row of a program; programs of one head are neighbours."""
    blocks = tl.cdiv(rows, ROWS)
    unit = pid // blocks
    return (unit % batch).to(tl.int64), (unit // batch).to(tl.int64), (pid % blocks) * ROWS


@triton.jit
def cells(row, stride, BLOCK_D: tl.constexpr):
    """Return the offsets of the channels of some rows, 64 bits wide: rows lie anywhere."""
    return row.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_rows(ptr, offsets, row, rows, WHOLE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return rows, 0 past the last one and past the last channel; WHOLE promises that no row is past."""
    channel = tl.arange(0, BLOCK_D)[None, :] < D
    if WHOLE:
        x = tl.load(ptr + offsets) if D == BLOCK_D else tl.load(ptr + offsets, mask=channel, other=0.0)
    else:
        x = tl.load(ptr + offsets, mask=(row < rows)[:, None] & channel, other=0.0)
    return x


@triton.jit
def base2_logits(
    q, k, bias_ptr, key, keys, scale2, WHOLE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Return the logits of some keys in base 2, -inf past the last key: rows loaded there are 0, not absent."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=WIDE) * scale2
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + key) if WHOLE else tl.load(bias_ptr + key, mask=key < keys, other=-float("inf"))
        s += (bias * LOG2E)[None, :]
    elif not WHOLE:
        s = tl.where((key < keys)[None, :], s, -float("inf"))
    return s


@triton.jit
def _step(
    sums, total, pivot, q, k_ptr, v_ptr, bias_ptr, k_cells, v_cells, key, keys, scale2,
    WHOLE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return sums, total and pivot with one more block of keys, some of which may not exist unless WHOLE."""
    WIDE: tl.constexpr = sums.dtype
    k = load_rows(k_ptr, k_cells, key, keys, WHOLE, D, BLOCK_D)
    s = base2_logits(q, k, bias_ptr, key, keys, scale2, WHOLE, PRECISION, WIDE)
    higher = tl.maximum(pivot, tl.max(s, 1))
    rescale = tl.exp2(pivot - higher)
    weights = tl.exp2(s - higher[:, None])
    total = total * rescale + tl.sum(weights, 1)
    v = load_rows(v_ptr, v_cells, key, keys, WHOLE, D, BLOCK_D)
    sums = tl.dot(
        weights.to(v.dtype), v, sums * rescale[:, None], input_precision=PRECISION, out_dtype=WIDE
    )  # fmt: skip
    return sums, total, higher


@triton.jit
def _over_keys(
    sums, total, pivot, q, k_ptr, v_ptr, bias_ptr, k_stride, v_stride, keys, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return sums, total and pivot with all keys of one source."""
    inner = tl.arange(0, KEYS)
    k_cells, v_cells = cells(inner, k_stride, BLOCK_D), cells(inner, v_stride, BLOCK_D)
    step = tl.full([], KEYS, tl.int64)
    whole = keys // KEYS * KEYS
    for first in tl.range(0, whole, KEYS):
        sums, total, pivot = _step(
            sums, total, pivot, q, k_ptr, v_ptr, bias_ptr, k_cells, v_cells, first + inner, keys, scale2,
            True, D, BLOCK_D, PRECISION,
        )  # fmt: skip
        k_ptr += step * k_stride
        v_ptr += step * v_stride
    if whole < keys:
        sums, total, pivot = _step(
            sums, total, pivot, q, k_ptr, v_ptr, bias_ptr, k_cells, v_cells, whole + inner, keys, scale2,
            False, D, BLOCK_D, PRECISION,
        )  # fmt: skip
    return sums, total, pivot


@triton.jit
def _finish(sums, total, pivot):
    """Return attention and natural log-sum-exp; a row without a live key has 0 and -inf."""
    dead = total == 0
    total = tl.where(dead, 1.0, total)
    return sums / total[:, None], tl.where(dead, -float("inf"), (pivot + tl.log2(total)) * LN2)


@triton.jit(do_not_specialize=["bias_h", "batch", "heads", "queries", "length", "slots"])
def attend_kernel(
    q_ptr, k_ptr, v_ptr, bank_k_ptr, bank_v_ptr, bias_ptr, gate_ptr, out_ptr, lse_ptr, local_ptr, bank_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bank_k_h, bank_k_m, bank_v_h, bank_v_m, out_b, out_h, out_n,
    gate_b, gate_h, gate_n, bias_h, batch, heads, queries, length, slots, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out and log-sum-exp of one block of queries, and where gated both parts."""
    WIDE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    b, h, first = block_of(tl.program_id(0), batch, queries, QUERIES)
    row = first + tl.arange(0, QUERIES)
    live = row < queries
    q = load_rows(q_ptr + b * q_b + h * q_h, cells(row, q_n, BLOCK_D), row, queries, False, D, BLOCK_D)
    sums = tl.zeros([QUERIES, BLOCK_D], WIDE)
    total = tl.zeros([QUERIES], WIDE)
    pivot = tl.full([QUERIES], LOWEST, WIDE)
    sums, total, pivot = _over_keys(
        sums, total, pivot, q, k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h, None, k_n, v_n, length, scale2,
        D, BLOCK_D, KEYS, PRECISION,
    )  # fmt: skip
    at = b * out_b + h * out_h + cells(row, out_n, BLOCK_D)
    mask = live[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    lse_at = (b * heads + h) * queries + row
    if gate_ptr is not None:
        local, lse = _finish(sums, total, pivot)
        tl.store(local_ptr + at, local.to(local_ptr.dtype.element_ty), mask=mask)
        tl.store(lse_ptr + lse_at, lse, mask=live)
        lse_at += batch.to(tl.int64) * heads * queries
        sums = tl.zeros([QUERIES, BLOCK_D], WIDE)
        total = tl.zeros([QUERIES], WIDE)
        pivot = tl.full([QUERIES], LOWEST, WIDE)
    sums, total, pivot = _over_keys(
        sums, total, pivot, q, bank_k_ptr + h * bank_k_h, bank_v_ptr + h * bank_v_h,
        bias_ptr if bias_ptr is None else bias_ptr + h * bias_h, bank_k_m, bank_v_m, slots, scale2,
        D, BLOCK_D, KEYS, PRECISION,
    )  # fmt: skip
    out, lse = _finish(sums, total, pivot)
    tl.store(lse_ptr + lse_at, lse, mask=live)
    if gate_ptr is not None:
        tl.store(bank_ptr + at, out.to(bank_ptr.dtype.element_ty), mask=mask)
        # other threads of this program may have written the local part
        tl.debug_barrier()
        local = tl.load(local_ptr + at, mask=mask, other=0.0).to(WIDE)
        gate = tl.load(gate_ptr + b * gate_b + h * gate_h + row.to(tl.int64) * gate_n, mask=live, other=0.0)
        out = local + gate[:, None] * out
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def forward(problem: Problem, tiles: Tiles | None = None) -> Attended:
    """Return attention and what its backward pass needs."""
    batch, heads, queries, length, slots, channels = problem.sizes
    q, k, v, bank_k, bank_v = problem.q, problem.k, problem.v, problem.bank_k, problem.bank_v
    bias, gate = problem.bias, problem.gate
    attended = unfilled(problem)
    tile = (tiles or tables.choose(problem)).attend
    attend_kernel[cdiv(queries, tile.queries) * batch * heads,](
        q, k, v, bank_k, bank_v, bias, gate, attended.out, attended.lse, attended.local_out, attended.bank_out,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bank_k.stride()[:2], *bank_v.stride()[:2],
        *attended.out.stride()[:3], *gate_strides(gate), bias_stride(bias),
        batch, heads, queries, length, slots, problem.scale * math.log2(math.e),
        channels, tables.padded(channels), tile.queries, tile.keys, problem.product_precision,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return attended


def gate_strides(gate: Tensor | None) -> tuple[int, ...]:
    """Return the strides of gate over images, heads and queries."""
    return (0, 0, 0) if gate is None else gate.stride()


def bias_stride(bias: Tensor | None) -> int:
    """Return the stride of bias over heads."""
    return 0 if bias is None else bias.stride(0)
