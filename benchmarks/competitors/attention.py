"""Decoupled cross-attention and what a user would otherwise run.

B batch, H heads, N queries and local keys, M bank slots, D channels of a head.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedoap.kernels import AttentionMode, decoupled_cross_attention


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of one call; local attention has as many keys as queries."""

    b: int
    h: int
    n: int
    m: int
    d: int
    gated: bool = False

    def __str__(self) -> str:
        return f"B{self.b} H{self.h} N{self.n} M{self.m} D{self.d}{' gated' if self.gated else ''}"

    @property
    def mode(self) -> AttentionMode:
        """One softmax or two."""
        return "gated" if self.gated else "joint"

    def flops(self, part: str) -> float:
        """Two products forwards, five backwards: the logits are made again."""
        product = 2.0 * self.b * self.h * self.n * (self.n + self.m) * self.d
        return product * {"forward": 2, "backward": 5, "both": 7}[part]

    def bytes(self, part: str, itemsize: int) -> float:
        """The least that goes through memory: each input read and each output written once."""
        tokens, bank = self.b * self.h * self.n * self.d * itemsize, self.h * self.m * self.d * itemsize
        lse = 4 * self.b * self.h * self.n * (2 if self.gated else 1)
        forward = 4 * tokens + 2 * bank + lse
        backward = 8 * tokens + 4 * bank + 2 * lse  # reads q, k, v, out, its gradient; writes dq, dk, dv
        return {"forward": forward, "backward": backward, "both": forward + backward}[part]


@dataclass(frozen=True, slots=True)
class Attention:
    """One call's tensors, all asking for gradients."""

    shape: AttentionShape
    q: Tensor
    k: Tensor
    v: Tensor
    bank_k: Tensor
    bank_v: Tensor
    gate: Tensor | None

    @classmethod
    def random(cls, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> Self:
        """Return normal values, the same for each call."""
        s, generator = shape, torch.Generator(device).manual_seed(0)
        sizes = [(s.b, s.h, s.n, s.d)] * 3 + [(s.h, s.m, s.d)] * 2
        normal = partial(torch.randn, generator=generator, device=device)
        q, k, v, bank_k, bank_v = (normal(size).to(dtype).requires_grad_() for size in sizes)
        return cls(shape, q, k, v, bank_k, bank_v, normal(s.h).sigmoid().requires_grad_() if s.gated else None)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What gradients are taken of."""
        return (self.q, self.k, self.v, self.bank_k, self.bank_v, *(() if self.gate is None else (self.gate,)))

    def to(self, dtype: torch.dtype) -> "Attention":
        """Return detached copies of the tokens in another dtype."""
        q, k, v, bank_k, bank_v = (t.detach().to(dtype).requires_grad_() for t in self.inputs[:5])
        gate = None if self.gate is None else self.gate.detach().clone().requires_grad_()
        return Attention(self.shape, q, k, v, bank_k, bank_v, gate)


Compute: TypeAlias = Callable[[Attention], Tensor]


def fedoap(x: Attention) -> Tensor:
    """Return this project's attention."""
    return decoupled_cross_attention(x.q, x.k, x.v, x.bank_k, x.bank_v, gate=x.gate, mode=x.shape.mode)


def fedoap_biased(x: Attention) -> Tensor:
    """Return this project's attention with a bias of 0 for each slot."""
    bias = torch.zeros(x.shape.m, device=x.q.device)
    return decoupled_cross_attention(x.q, x.k, x.v, x.bank_k, x.bank_v, gate=x.gate, mode=x.shape.mode, slot_bias=bias)


def reference(x: Attention) -> Tensor:
    """Return plain PyTorch's result in the inputs' own precision."""
    return decoupled_cross_attention(x.q, x.k, x.v, x.bank_k, x.bank_v, gate=x.gate, mode=x.shape.mode, backend="eager")


def sdpa(x: Attention, backend: SDPBackend | None = None, *, biased: bool = False) -> Tensor:
    """Return PyTorch's attention: over the concatenation with the expanded bank, or twice where gated."""
    b, h, n = x.shape.b, x.shape.h, x.shape.n
    bank_k, bank_v = (t.expand(b, *t.shape) for t in (x.bank_k, x.bank_v))
    with nullcontext() if backend is None else sdpa_kernel(backend):
        if x.gate is not None:
            local = F.scaled_dot_product_attention(x.q, x.k, x.v)
            bank = F.scaled_dot_product_attention(x.q, bank_k, bank_v)
            return local + x.gate.to(x.q.dtype)[:, None, None] * bank
        bias = torch.zeros(n + x.shape.m, dtype=x.q.dtype, device=x.q.device).expand(b, h, n, -1) if biased else None
        keys, values = torch.cat([x.k, bank_k], 2), torch.cat([x.v, bank_v], 2)
        return F.scaled_dot_product_attention(x.q, keys, values, attn_mask=bias)


def products(x: Attention) -> Tensor:
    """Return attention by products in the inputs' dtype, the bank folded into one a head and never expanded."""
    return _products((x.q, x.k, x.v, x.bank_k, x.bank_v), x.gate)


def _products(tokens: tuple[Tensor, ...], gate: Tensor | None) -> Tensor:
    q, k, v, bank_k, bank_v = tokens
    b, h, n, d = q.shape
    rows = q.transpose(0, 1).reshape(h, b * n, d) * d**-0.5
    local = ((q * d**-0.5).flatten(0, 1) @ k.flatten(0, 1).mT).view(b, h, n, -1)
    bank = (rows @ bank_k.mT).view(h, b, n, -1).transpose(0, 1)
    if gate is None:
        weights = torch.cat([local, bank], -1).softmax(-1)
        local, bank = weights[..., : k.shape[2]], weights[..., k.shape[2] :]
    else:
        local, bank = local.softmax(-1), bank.softmax(-1) * gate.to(q.dtype)[:, None, None]
    out = (bank.transpose(0, 1).reshape(h, b * n, -1) @ bank_v).view(h, b, n, d).transpose(0, 1)
    return torch.baddbmm(out.reshape(b * h, n, d), local.flatten(0, 1), v.flatten(0, 1)).view(b, h, n, d)


def flex(x: Attention) -> Tensor:
    """Return compiled FlexAttention over the concatenation, or twice where gated."""
    attend = _compiled_flex()
    bank_k, bank_v = (t.expand(x.shape.b, *t.shape) for t in (x.bank_k, x.bank_v))
    if x.gate is not None:
        return attend(x.q, x.k, x.v) + x.gate.to(x.q.dtype)[:, None, None] * attend(x.q, bank_k, bank_v)
    return attend(x.q, torch.cat([x.k, bank_k], 2), torch.cat([x.v, bank_v], 2))


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


@cache
def _compiled_products(mode: str) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(_products, mode=mode, dynamic=False)
    return compiled


def compiled(x: Attention, mode: str = "default") -> Tensor:
    """Return what torch.compile makes of `products`."""
    return _compiled_products(mode)((x.q, x.k, x.v, x.bank_k, x.bank_v), x.gate)


def chosen_backend(x: Attention) -> str:
    """Return the name of what PyTorch's attention runs for these inputs."""
    bank = x.bank_k.expand(x.shape.b, *x.bank_k.shape)
    keys = x.k if x.gate is not None else torch.cat([x.k, bank], 2)
    return SDPBackend(torch._fused_sdp_choice(x.q, keys, keys)).name.lower().replace("_attention", "")


CPU: dict[str, Compute] = {"fedoap": fedoap, "sdpa": sdpa, "products": products}
"""What is worth timing where there is no GPU."""

GPU: dict[str, Compute] = {
    "fedoap": fedoap,
    "fedoap again": fedoap,
    "fedoap + bias": fedoap_biased,
    "sdpa": sdpa,
    "sdpa + bias": partial(sdpa, biased=True),
    "sdpa flash": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "sdpa math": partial(sdpa, backend=SDPBackend.MATH),
    "products": products,
    "products, compiled": partial(compiled, mode="max-autotune-no-cudagraphs"),
    "flex": flex,
}
"""By name; "fedoap again" tells the noise of the timing."""
