"""What the parts of decoupled cross-attention hand to each other.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head. "Wide" is float32, or
float64 where q is float64.
"""

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


def ordered_like(x: Tensor, like: Tensor) -> Tensor:
    """Return x laid out in memory in the order of `like`'s strides, so that views of q work on the result."""
    order = memory_order(like)
    return x.permute(order).contiguous().permute(inverse(order))


def memory_order(x: Tensor) -> list[int]:
    """Return the axes of x from the largest stride to the smallest, ties in their own order."""
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda axis: -strides[axis])


def inverse(order: list[int]) -> list[int]:
    """Return the permutation that undoes `order`."""
    return [order.index(axis) for axis in range(len(order))]
