"""Backward pass of the flash route: weights made again from the log-sum-exp, no atomic addition.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.

    p = 2^(s - lse), dp = dout @ v^T, ds = p (gate dp - delta)      of each source; gate is 1 but at the bank's
    statistics_kernel  delta = rowsum(dout out) - dlse, dgate       a dead row's lse becomes inf: p is 0
    dq_kernel          dq = scale sum over both sources of ds @ k   one program a block of queries
    dkv_kernel         dk = scale ds^T @ q, dv = (gate p)^T @ dout  one program a block of keys
    fold_kernel        adds the parts of the bank's gradients, first to last

A program of `dkv_kernel` loops over the queries of its image, or for a block of the bank's slots over
those of a part of the batch: each output element is summed by one program in a fixed order. With more
than one part, parts are wide and folded. The bank's programs come first, as they take longest; a bank
that wants no gradient has none.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedoap.kernels.dca import tiles as tables
from fedoap.kernels.dca.flash_forward import LOG2E, bias_stride, block_of, cells, gate_strides, load_rows
from fedoap.kernels.dca.flash_gradients import PADDING, dkv_kernel, dq_kernel, plane_size
from fedoap.kernels.dca.problem import Attended, Gradients, Problem, Wanted, dense_like
from fedoap.kernels.dca.tiles import Tiles
from fedoap.kernels.sizes import cdiv

FOLD = 1024


@triton.jit
def _store_statistics(ptr, plane, product, lse_ptr, dlse_ptr, live):
    """Write base 2 log-sum-exp and delta of some rows at `ptr` and one plane further."""
    lse = tl.load(lse_ptr, mask=live, other=-float("inf"))
    dead = lse == -float("inf")
    delta = product
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr, mask=live, other=0.0)
    tl.store(ptr, tl.where(dead, float("inf"), lse * LOG2E))
    tl.store(ptr + plane, tl.where(dead, 0.0, delta))


@triton.jit(do_not_specialize=["batch", "heads", "queries"])
def statistics_kernel(
    out_ptr, bank_ptr, dout_ptr, lse_ptr, dlse_ptr, gate_ptr, stats_ptr, dgate_ptr,
    out_b, out_h, out_n, dout_b, dout_h, dout_n, gate_b, gate_h, gate_n, batch, heads, queries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the statistics, padding included, and dgate (B, H, N)."""
    WIDE: tl.constexpr = lse_ptr.dtype.element_ty
    b, h, first = block_of(tl.program_id(0), batch, tl.cdiv(queries, PADDING) * PADDING, ROWS)
    row = first + tl.arange(0, ROWS)
    live = row < queries
    at, count = (b * heads + h) * queries + row, batch.to(tl.int64) * heads * queries
    stats_at, plane = stats_ptr + plane_size(b * heads + h, 1, queries) + row, plane_size(batch, heads, queries)
    out_at = b * out_b + h * out_h + cells(row, out_n, BLOCK_D)
    out = load_rows(out_ptr, out_at, row, queries, False, D, BLOCK_D).to(WIDE)
    dout_at = b * dout_b + h * dout_h + cells(row, dout_n, BLOCK_D)
    dout = load_rows(dout_ptr, dout_at, row, queries, False, D, BLOCK_D).to(WIDE)
    dlse_at = dlse_ptr if dlse_ptr is None else dlse_ptr + at
    _store_statistics(stats_at, plane, tl.sum(out * dout, 1), lse_ptr + at, dlse_at, live)
    if gate_ptr is not None:
        out = load_rows(bank_ptr, out_at, row, queries, False, D, BLOCK_D).to(WIDE)
        product = tl.sum(out * dout, 1)
        gate = tl.load(gate_ptr + b * gate_b + h * gate_h + row.to(tl.int64) * gate_n, mask=live, other=0.0)
        if dgate_ptr is not None:
            tl.store(dgate_ptr + at, product, mask=live)
        dlse_at = dlse_ptr if dlse_ptr is None else dlse_at + count
        _store_statistics(stats_at + 2 * plane, plane, product * gate, lse_ptr + count + at, dlse_at, live)
        tl.store(stats_at + 4 * plane, gate)


@triton.jit(do_not_specialize=["splits", "count", "dbias_count"])
def fold_kernel(
    dk_parts_ptr, dv_parts_ptr, dbias_parts_ptr, dk_ptr, dv_ptr, dbias_ptr, splits, count, dbias_count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one block of the sums over parts, first to last, of dk, dv or dbias (program id 1)."""
    which = tl.program_id(1)
    if which == 0:
        _fold(dk_parts_ptr, dk_ptr, splits, count, BLOCK)
    elif which == 1:
        _fold(dv_parts_ptr, dv_ptr, splits, count, BLOCK)
    elif dbias_ptr is not None:
        _fold(dbias_parts_ptr, dbias_ptr, splits, dbias_count, BLOCK)


@triton.jit
def _fold(parts_ptr, out_ptr, splits, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], parts_ptr.dtype.element_ty)
    for _ in range(splits):
        total += tl.load(parts_ptr + at, mask=at < count, other=0.0)
        parts_ptr += count
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < count)


def backward(
    problem: Problem,
    attended: Attended,
    dout: Tensor,
    dlse: Tensor | None,
    wanted: Wanted,
    tiles: Tiles | None = None,
) -> Gradients:
    """Return the wanted gradients; kernels of which nothing is wanted do not run."""
    chosen = tiles or tables.choose(problem)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    stats, dgate = _statistics(problem, attended, dout, dlse, wanted, chosen)
    dq = _dq(problem, dout, stats, chosen) if wanted.q else None
    dk, dv, bank_dk, bank_dv, dbias = _dkv(problem, dout, stats, wanted, chosen)
    return Gradients(dq, dk, dv, bank_dk, bank_dv, dbias, dgate)


def _statistics(
    problem: Problem, attended: Attended, dout: Tensor, dlse: Tensor | None, wanted: Wanted, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    """Return the statistics of each row, see `flash_gradients`, and the gate's gradient."""
    batch, heads, queries, _, _, channels = problem.sizes
    gate, lse = problem.gate, attended.lse
    rows = cdiv(queries, PADDING.value) * PADDING.value
    stats = lse.new_empty((2 if gate is None else 5, batch, heads, rows))
    dgate = lse.new_empty((batch, heads, queries)) if wanted.gate else None
    out = attended.out if attended.local_out is None else attended.local_out
    statistics_kernel[rows // tiles.rows * batch * heads,](
        out, attended.bank_out, dout, lse, None if dlse is None else dlse.contiguous(), gate, stats, dgate,
        *out.stride()[:3], *dout.stride()[:3], *gate_strides(gate), batch, heads, queries,
        channels, tables.padded(channels), tiles.rows, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return stats, dgate


def _dq(problem: Problem, dout: Tensor, stats: Tensor, tiles: Tiles) -> Tensor:
    batch, heads, queries, length, slots, channels = problem.sizes
    q, k, v, bank_k, bank_v = problem.q, problem.k, problem.v, problem.bank_k, problem.bank_v
    dq, tile = dense_like(q), tiles.dq
    dq_kernel[cdiv(queries, tile.queries) * batch * heads,](
        q, k, v, bank_k, bank_v, problem.bias, dout, stats, dq,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bank_k.stride()[:2], *bank_v.stride()[:2],
        *dout.stride()[:3], *dq.stride()[:3], bias_stride(problem.bias),
        batch, heads, queries, length, slots, problem.scale, problem.scale * math.log2(math.e),
        channels, tables.padded(channels), tile.queries, tile.keys, problem.gate is not None, problem.product_precision,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return dq


def _dkv(
    problem: Problem, dout: Tensor, stats: Tensor, wanted: Wanted, tiles: Tiles
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of k, v, bank_k, bank_v and bias."""
    batch, heads, queries, length, slots, channels = problem.sizes
    q, k, v, bank_k, bank_v = problem.q, problem.k, problem.v, problem.bank_k, problem.bank_v
    of_local = (wanted.k or wanted.v) and length > 0
    of_bank = (wanted.bank_k or wanted.bank_v or wanted.bias) and slots > 0
    tile, splits = tiles.dkv, tiles.splits(problem) if of_bank else 1
    local_programs = cdiv(length, tile.keys) * batch * heads if of_local else 0
    bank_programs = cdiv(slots, tile.keys) * heads * splits if of_bank else 0
    dk, dv = dense_like(k), dense_like(v)
    bank_dk, bank_dv = (x.new_empty(x.shape) for x in (bank_k, bank_v))
    dbias = stats.new_empty((heads, slots)) if wanted.bias else None
    parts = _parts(problem, splits, wanted, stats.dtype) if splits > 1 else (bank_dk, bank_dv, dbias)
    if local_programs + bank_programs:
        dkv_kernel[local_programs + bank_programs,](
            q, k, v, bank_k, bank_v, problem.bias, dout, stats, dk, dv, *parts,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bank_k.stride()[:2], *bank_v.stride()[:2],
            *dout.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], bias_stride(problem.bias),
            batch, heads, queries, length, slots, bank_programs, splits,
            problem.scale, problem.scale * math.log2(math.e),
            channels, tables.padded(channels), tile.queries, tile.keys, problem.gate is not None,
            problem.product_precision,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    if splits > 1:
        fold_kernel[cdiv(bank_dk.numel(), FOLD), 2 if dbias is None else 3](
            *parts,
            bank_dk,
            bank_dv,
            dbias,
            splits,
            bank_dk.numel(),
            heads * slots,
            FOLD,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return (
        dk if wanted.k else None, dv if wanted.v else None,
        bank_dk if wanted.bank_k else None, bank_dv if wanted.bank_v else None, dbias,
    )  # fmt: skip


def _parts(problem: Problem, splits: int, wanted: Wanted, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return room for the parts of the gradients of bank_k, bank_v and bias."""
    bank_k = problem.bank_k
    dk, dv = bank_k.new_empty((2, splits, *bank_k.shape), dtype=wide)
    return dk, dv, bank_k.new_empty((splits, *bank_k.shape[:2]), dtype=wide) if wanted.bias else None
