"""What the parts of decoupled cross-attention hand to each other.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head. "Wide" is float32, or
float64 where q is float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

AttentionMode: TypeAlias = Literal["joint", "gated"]
Precision: TypeAlias = Literal["tf32", "tf32x3", "ieee"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One call, checked: every tensor may have any strides, 0 included.

    Triton kernels get tensors whose last stride is 1, bias and gate excepted.
    """

    q: Tensor
    """(B, H, N, D)."""
    k: Tensor
    """(B, H, L, D)."""
    v: Tensor
    """(B, H, L, D)."""
    bank_k: Tensor
    """(H, M, D)."""
    bank_v: Tensor
    """(H, M, D)."""
    bias: Tensor | None
    """(H, M), wide; added to the bank's logits."""
    gate: Tensor | None
    """(B, H, N), wide; None is `joint`."""
    scale: float
    """Factor of the products q k^T."""
    precision: Precision
    """Least precision of float32 products; of no effect for other inputs."""

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, H, N, L, M, D."""
        batch, heads, queries, channels = self.q.shape
        return batch, heads, queries, self.k.shape[2], self.bank_k.shape[1], channels

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums, log-sum-exp, bias and gate."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def product_precision(self) -> Precision:
        """What Triton's products take as `input_precision`."""
        return self.precision if self.q.dtype == torch.float32 else "ieee"


@dataclass(frozen=True, slots=True)
class Attended:
    """What a forward pass gives and a backward pass needs again."""

    out: Tensor
    """(B, H, N, D) in q's dtype and in the order of q's strides."""
    lse: Tensor
    """(B, H, N) wide, natural; where gated (2, B, H, N): local, bank."""
    local_out: Tensor | None = None
    """Like `out`: the local part, kept where gated."""
    bank_out: Tensor | None = None
    """Like `out`: the bank's part before the gate, kept where gated."""
    weights: Tensor | None = None
    """The wide route's un-normalised weights, kept where they are no larger than q; see `wide_forward`."""
    pivots: Tensor | None = None
    """The base 2 logarithms that `weights` are relative to."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients a backward pass is asked for."""

    q: bool
    k: bool
    v: bool
    bank_k: bool
    bank_v: bool
    bias: bool
    gate: bool


@dataclass(frozen=True, slots=True)
class Gradients:
    """The gradients of a `Problem`'s tensors, each of its tensor's shape and dtype; None where not wanted."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bank_k: Tensor | None = None
    bank_v: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None


def dense_like(x: Tensor) -> Tensor:
    """Return new memory of x's shape, in the order of x's strides, its last axis innermost."""
    if x.is_contiguous() or (x.dim() == 4 and x.transpose(1, 2).is_contiguous()):
        return torch.empty_like(x)  # the same, sooner
    # an axis expanded from 1 has stride 0, yet must not lie inside of the last one
    order = [*_outermost_first(x.stride()[:-1]), x.dim() - 1]
    dense = x.new_empty([x.shape[axis] for axis in order])
    return dense.permute([order.index(axis) for axis in range(x.dim())])


def inner_contiguous(x: Tensor) -> Tensor:
    """Return x, copied where neighbours on its last axis are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def ordered_like(x: Tensor, like: Tensor) -> Tensor:
    """Return x laid out in memory in the order of `like`'s strides, so that views of q work on the result."""
    order = _outermost_first(like.stride())
    return x.permute(order).contiguous().permute([order.index(axis) for axis in range(like.dim())])


def _outermost_first(strides: Sequence[int]) -> list[int]:
    """Return the axes from the largest stride to the smallest, ties in their own order."""
    order: list[int] = []
    for axis, stride in enumerate(strides):
        # torch.compile can compare strides that it does not know yet, but not sort by them
        order.insert(sum(1 for other in order if strides[other] >= stride), axis)
    return order


def unfilled(problem: Problem) -> Attended:
    """Return the tensors of a result, not filled; where gated, both parts too."""
    q = problem.q
    if problem.gate is None:
        return Attended(dense_like(q), q.new_empty(q.shape[:3], dtype=problem.wide))
    lse = q.new_empty((2, *q.shape[:3]), dtype=problem.wide)
    return Attended(dense_like(q), lse, dense_like(q), dense_like(q))


def unfilled_gradients(problem: Problem, wanted: Wanted) -> Gradients:
    """Return the tensors of the wanted gradients, not filled: tokens in the order of their strides."""

    def empty(x: Tensor | None, want: bool) -> Tensor | None:
        return x.new_empty(x.shape) if want and x is not None else None

    return Gradients(
        dense_like(problem.q) if wanted.q else None,
        dense_like(problem.k) if wanted.k else None,
        dense_like(problem.v) if wanted.v else None,
        empty(problem.bank_k, wanted.bank_k),
        empty(problem.bank_v, wanted.bank_v),
        empty(problem.bias, wanted.bias),
        empty(problem.gate, wanted.gate),
    )
