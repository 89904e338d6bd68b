"""Decoupled cross-attention: queries attend to an image's own tokens and to a global bank.

    joint   one softmax over the concatenation of both:
            out = softmax([q k^T ; q bank_k^T + slot_bias]) [v ; bank_v]
    gated   two softmaxes: out = A(q, k, v) + gate * A(q, bank_k, bank_v)

Shapes: B batch, H heads, N queries, L local keys, M bank slots, D channels of a head. The bank has
no batch dimension and is never expanded to one. The operation follows FedOAP (arXiv 2511.18847); the
bank and both modes are this project's.

A row without any live key (no local key, and every slot at -inf) gives 0 with a log-sum-exp of -inf
and zero gradients, never NaN. Sums run in float32 for half-precision inputs.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias, get_args, overload

import torch
from torch import Tensor

from fedoap.kernels import backend as backends
from fedoap.kernels.backend import Backend

AttentionMode: TypeAlias = Literal["joint", "gated"]
Precision: TypeAlias = Literal["tf32", "tf32x3", "ieee"]

_NAME = "decoupled_cross_attention"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Queries, local keys and values, and the bank."""

    q: Tensor
    k: Tensor
    v: Tensor
    bank_k: Tensor
    bank_v: Tensor

    def to(self, dtype: torch.dtype) -> Self:
        return type(self)(*(t.to(dtype) for t in (self.q, self.k, self.v, self.bank_k, self.bank_v)))


def _eager(
    tokens: _Tokens, slot_bias: Tensor | None, gate: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return attention and log-sum-exp by plain PyTorch: what every other backend must reproduce."""
    (batch, heads, queries, channels), slots = tokens.q.shape, tokens.bank_k.shape[1]
    work = torch.promote_types(tokens.q.dtype, torch.float32)
    wide = tokens.to(work)
    scaled = replace(wide, q=wide.q * (channels**-0.5 if scale is None else scale))
    bias = wide.q.new_zeros(1, slots) if slot_bias is None else slot_bias.to(work).unsqueeze(-2)
    if gate is None:
        out, lse = _joint(scaled, bias)
    else:
        factor = gate.to(work).view(1, heads, 1) if gate.shape == (heads,) else gate.to(work)
        out, lse = _gated(scaled, bias, factor.expand(batch, heads, queries))
    return _ordered_like(out.to(tokens.q.dtype), tokens.q), lse


def _joint(x: _Tokens, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention and log-sum-exp of one softmax over local and bank keys; q is scaled already."""
    length = x.k.shape[2]
    logits = torch.cat([x.q @ x.k.mT, _by_head(x.q, x.bank_k.mT) + bias], -1)  # (B, H, N, L + M)
    weights, total, lse = _softmax(logits)
    return (weights[..., :length] @ x.v + _by_head(weights[..., length:], x.bank_v)) / total, lse


def _gated(x: _Tokens, bias: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return local attention plus gate times bank attention, and the two log-sum-exps stacked."""
    weights, total, local_lse = _softmax(x.q @ x.k.mT)
    local = weights @ x.v / total
    weights, total, bank_lse = _softmax(_by_head(x.q, x.bank_k.mT) + bias)
    return local + gate[..., None] * _by_head(weights, x.bank_v) / total, torch.stack([local_lse, bank_lse])


def _by_head(x: Tensor, y: Tensor) -> Tensor:
    """Return x (B, H, N, K) times y (H, K, J), one product a head."""
    # torch.matmul would broadcast y over the batch and copy it B times; folding B into the rows does not
    batch, heads, rows, inner = x.shape
    folded = x.transpose(0, 1).reshape(heads, batch * rows, inner)
    return torch.bmm(folded, y).view(heads, batch, rows, y.shape[-1]).transpose(0, 1)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, their total (..., 1) and the log-sum-exp (...) of the last dimension.

    The weights are not normalised: dividing what they average costs a pass less over the largest tensor.
    Where no logit is above -inf they are 0, their total is 1, and the log-sum-exp is -inf.
    """
    if logits.shape[-1] == 0:
        none = logits.sum(-1, keepdim=True)
        return logits, none + 1, (none - torch.inf).squeeze(-1)
    pivot = logits.detach().amax(-1, keepdim=True)
    pivot = torch.where(pivot == -torch.inf, 0.0, pivot)
    weights = (logits - pivot).exp_()
    total = weights.sum(-1, keepdim=True)
    # a dead row's total is 0: dividing by 1 instead keeps 0/0 and log(0) out of the backward pass too
    dead = total == 0
    total = torch.where(dead, 1.0, total)
    lse = torch.where(dead, -torch.inf, pivot + torch.log(total))
    return weights, total, lse.squeeze(-1)


def _ordered_like(x: Tensor, like: Tensor) -> Tensor:
    """Return x laid out in memory in the order of `like`'s strides, so that views of q work on the result."""
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda axis: -strides[axis])
    return x.permute(order).contiguous().permute([order.index(axis) for axis in range(like.dim())])


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
        backend: `auto` or `eager`; this version has no Triton kernels.
        precision: least precision of float32 products; the eager backend follows PyTorch's own setting
            on an accelerator and takes none there.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, or an option is unknown.
        NotImplementedError: backend `triton`.
    """
    chosen = backends.choose(backend, _NAME)
    _check_options(mode, gate, precision, q.device.type)
    tokens = _autocast(_Tokens(q, k, v, bank_k, bank_v))
    _check_tokens(tokens)
    _check_bias_and_gate(tokens, slot_bias, gate)
    with torch.autocast(q.device.type, enabled=False):
        match chosen:
            case "eager":
                out, lse = _eager(tokens, slot_bias, gate, scale)
    return (out, lse) if return_lse else out


def _autocast(tokens: _Tokens) -> _Tokens:
    """Return the tokens in autocast's dtype where autocast is on."""
    device = tokens.q.device.type
    return tokens.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tokens


def _check_options(mode: AttentionMode, gate: Tensor | None, precision: Precision | None, device: str) -> None:
    if mode not in get_args(AttentionMode):
        raise ValueError(f"{_NAME}: mode is {mode!r}, but must be one of {', '.join(get_args(AttentionMode))}")
    if (gate is not None) != (mode == "gated"):
        raise ValueError(f"{_NAME}: gate is {'missing' if gate is None else 'given'}, but mode is {mode!r}")
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(f"{_NAME}: precision is {precision!r}, but must be one of {', '.join(get_args(Precision))}")
    if precision is not None and device != "cpu":
        raise ValueError(
            f"{_NAME}: precision is {precision!r}, but eager products on {device} follow PyTorch's setting"
        )


def _check_tokens(x: _Tokens) -> None:
    q = x.q
    if q.dim() != 4:
        raise ValueError(f"{_NAME}: q has shape {tuple(q.shape)}, but must be (batch, heads, queries, channels)")
    if q.dtype not in _DTYPES:
        raise ValueError(f"{_NAME}: q is {q.dtype}, but must be a float of 16 to 64 bits")
    batch, heads, _, channels = q.shape
    length = x.k.shape[2] if x.k.dim() == 4 else "keys"
    slots = x.bank_k.shape[1] if x.bank_k.dim() == 3 else "slots"
    for name, tensor in (("k", x.k), ("v", x.v)):
        _check_token(name, tensor, q, (batch, heads, length, channels))
    for name, tensor in (("bank_k", x.bank_k), ("bank_v", x.bank_v)):
        _check_token(name, tensor, q, (heads, slots, channels))


def _check_token(name: str, tensor: Tensor, q: Tensor, shape: tuple[int | str, ...]) -> None:
    if tuple(tensor.shape) != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{_NAME}: {name} has shape {tuple(tensor.shape)}, but must be ({expected})")
    _check_like(name, tensor, q)
    if tensor.dtype != q.dtype:
        raise ValueError(f"{_NAME}: {name} is {tensor.dtype}, but q is {q.dtype}")


def _check_bias_and_gate(x: _Tokens, slot_bias: Tensor | None, gate: Tensor | None) -> None:
    (batch, heads, queries, _), slots = x.q.shape, x.bank_k.shape[1]
    if slot_bias is not None:
        _check_like("slot_bias", slot_bias, x.q)
        shape = tuple(slot_bias.shape)
        if shape not in ((slots,), (heads, slots)):
            raise ValueError(f"{_NAME}: slot_bias has shape {shape}, but must be ({slots},) or ({heads}, {slots})")
    if gate is not None:
        _check_like("gate", gate, x.q)
        shape, rows = tuple(gate.shape), (batch, heads, queries)
        if shape != (heads,) and not _broadcasts(shape, rows):
            raise ValueError(f"{_NAME}: gate has shape {shape}, but must be ({heads},) or broadcast to {rows}")


def _check_like(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{_NAME}: {name} is on {tensor.device}, but q is on {q.device}")
    if not tensor.is_floating_point():
        raise ValueError(f"{_NAME}: {name} is {tensor.dtype}, but must be a float")


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        own in (1, wanted) for own, wanted in zip(reversed(shape), reversed(target), strict=False)
    )
