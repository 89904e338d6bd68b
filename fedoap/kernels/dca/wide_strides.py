"""Rows that a GPU can load 16 bytes at a time.

Triton knows of an argument no more than whether 16 divides it. Where D is 8 mod 16 it would load one
element at a time; so strides go to the wide route's kernels in units of 8 elements where D allows it.
"""

from dataclasses import replace
from operator import is_

import torch
from torch import Tensor

from fedoap.kernels.dca.problem import Problem

_UNIT, _BYTES = 8, 16


def unit(channels: int) -> int:
    """Return the elements in a unit of strides for tokens of so many channels."""
    return _UNIT if channels % _UNIT == 0 else 1


def in_units(x: Tensor) -> tuple[int, ...]:
    """Return the strides of tokens x (..., D) without the last, in units; rows are aligned."""
    *sizes, channels = x.shape
    count = unit(channels)
    # called for each tensor of each launch
    return tuple([0 if size == 1 else stride // count for size, stride in zip(sizes, x.stride(), strict=False)])


def aligned_rows(x: Tensor) -> Tensor:
    """Return x (..., D), copied where D lets rows start at multiples of 16 bytes and they do not."""
    if x.shape[-1] % _UNIT or x.numel() == 0:
        return x
    if x.data_ptr() % _BYTES == 0:
        rows = zip(x.shape[:-1], x.stride(), strict=False)
        if x.is_contiguous() or all(size == 1 or stride % _UNIT == 0 for size, stride in rows):
            return x
    return x.clone(memory_format=torch.contiguous_format)


def with_aligned_rows(problem: Problem) -> Problem:
    """Return the problem with the rows of all tokens aligned."""
    p = problem
    tokens = (p.q, p.k, p.v, p.bank_k, p.bank_v)
    q, k, v, bank_k, bank_v = aligned = tuple(map(aligned_rows, tokens))
    if all(map(is_, aligned, tokens)):
        return problem
    return replace(problem, q=q, k=k, v=v, bank_k=bank_k, bank_v=bank_v)


def inner_contiguous(x: Tensor) -> Tensor:
    """Return x, copied where neighbours on its last axis are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()
