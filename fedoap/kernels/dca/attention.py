"""The public function: checks, autocast, choice of a backend.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.
"""

from contextlib import nullcontext
from typing import Literal, overload

import torch
from torch import Tensor

from fedoap.kernels import backend as backends
from fedoap.kernels.backend import Backend, constant_to_compilers
from fedoap.kernels.dca import op, reference
from fedoap.kernels.dca.checks import NAME, check_bias_and_gate, check_eager_precision, check_options, check_tokens
from fedoap.kernels.dca.problem import AttentionMode, Precision, Problem


@overload
def decoupled_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, bank_k: Tensor, bank_v: Tensor, *,
    slot_bias: Tensor | None = None, gate: Tensor | None = None, mode: AttentionMode = "joint",
    scale: float | None = None, return_lse: Literal[False] = False, backend: Backend = "auto",
    precision: Precision | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def decoupled_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, bank_k: Tensor, bank_v: Tensor, *,
    slot_bias: Tensor | None = None, gate: Tensor | None = None, mode: AttentionMode = "joint",
    scale: float | None = None, return_lse: Literal[True], backend: Backend = "auto",
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def decoupled_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bank_k: Tensor,
    bank_v: Tensor,
    *,
    slot_bias: Tensor | None = None,
    gate: Tensor | None = None,
    mode: AttentionMode = "joint",
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the attention of q to its image's tokens k, v and to the bank, in q's dtype and stride order.

    Under autocast q, k, v and the bank are cast to autocast's dtype; bias and gate never are.

    Args:
        q: (B, H, N, D).
        k: (B, H, L, D); L may be 0.
        v: like k.
        bank_k: (H, M, D); M may be 0.
        bank_v: like bank_k.
        slot_bias: (M,) or (H, M), added to the bank's logits; -inf takes a slot out.
        gate: `gated` only: (H,), or whatever broadcasts to (B, H, N); factor of the bank's attention.
        mode: one softmax (`joint`) or two (`gated`).
        scale: factor of the products q k^T; 1 / sqrt(D) where not given.
        return_lse: also return the natural log-sum-exp of the logits, differentiable, float32 (float64
            for float64 inputs): (B, H, N), or (2, B, H, N) for local and bank where `gated`.
        backend: `triton`, `eager`, or `auto`: Triton on a GPU unless FEDOAP_KERNELS says otherwise.
        precision: least precision of float32 products; where not given, what
            `torch.backends.cuda.matmul.fp32_precision` allows, and nothing less than `tf32x3` unless that
            is tf32. The eager backend follows that setting on a GPU and takes no precision there.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, an option is unknown, or backend is
            `triton` and cannot run.
    """
    check_options(mode, gate, precision)
    tokens = _autocast(q, k, v, bank_k, bank_v)
    check_tokens(*tokens)
    check_bias_and_gate(tokens[0], tokens[3], slot_bias, gate)
    chosen = backends.choose(backend, NAME, q.device, _unsupported(tokens[0]))
    if chosen == "triton":
        out, lse = op.attend(_problem(tokens, slot_bias, gate, scale, _precision(tokens[0], precision)))
    else:
        check_eager_precision(q, precision)
        with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):
            out, lse = reference.attend(_problem(tokens, slot_bias, gate, scale, "ieee"))
    return (out, lse) if return_lse else out


def _unsupported(q: Tensor) -> str | None:
    """Return what keeps kernels from these tokens, or None."""
    if q.shape[3] == 0:
        return "q has no channels"
    # interpreted kernels take float64, for checking gradients
    return "q is torch.float64" if q.dtype == torch.float64 and q.device.type != "cpu" else None


def _precision(q: Tensor, precision: Precision | None) -> Precision:
    """Return the precision of products: what is asked for, else what PyTorch is set to."""
    if q.dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"  # AMD's products know nothing between tf32 of some cards and this
    if precision is not None:
        return precision
    return "tf32" if _allows_tf32() else "tf32x3"


@constant_to_compilers
def _allows_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    # reading the older setting raises once the newer one is set
    newer: str | None = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if newer is None else newer == "tf32"


def _autocast(*tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the tokens in autocast's dtype where autocast is on; like PyTorch's own, it leaves float64 alone."""
    device = tokens[0].device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        narrow = torch.get_autocast_dtype(device)
        tokens = tuple(x.to(narrow) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tokens)
    q, k, v, bank_k, bank_v = tokens
    return q, k, v, bank_k, bank_v


def _problem(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    slot_bias: Tensor | None,
    gate: Tensor | None,
    scale: float | None,
    precision: Precision,
) -> Problem:
    """Return the call with bias and gate wide and of full shape, though not expanded in memory."""
    (batch, heads, queries, channels), slots = tokens[0].shape, tokens[3].shape[1]
    wide = torch.promote_types(tokens[0].dtype, torch.float32)
    bias = None if slot_bias is None else slot_bias.to(wide).expand(heads, slots)
    if gate is not None:
        by_row = gate.view(1, heads, 1) if gate.shape == (heads,) else gate
        gate = by_row.to(wide).expand(batch, heads, queries)
    return Problem(*tokens, bias, gate, max(1, channels) ** -0.5 if scale is None else scale, precision)
