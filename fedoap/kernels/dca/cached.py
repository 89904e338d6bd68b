"""Decoupled cross-attention in plain PyTorch that holds no more weights at a time than a cache does.

B batch, H heads, N queries, L local keys, M bank slots, D channels. A part is some heads of some batch
elements, heads first: bank products then run over all rows of a head, and the bank is never expanded.

    forward   S = scale q [k ; bank_k]^T + bias,  P = e^(S - max),  out = P [v ; bank_v] / sum P
    backward  dS = P / sum P (dout [v ; bank_v]^T - delta),
              delta = sum_d dout out - dlse, or sum P (dout v^T) / sum P - dlse of each softmax where gated

Small weights are kept for the backward pass, others made again from the log-sum-exp. What keeps none, inference above
all, goes forward by PyTorch's fused attention where there is one (`fused`). Differentiable once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedoap.kernels.dca import fused
from fedoap.kernels.dca.checks import NAME
from fedoap.kernels.dca.problem import Gradients, Problem, Wanted, dense_like, unfilled_gradients
from fedoap.kernels.once import once_differentiable

CPU_WEIGHTS, GPU_WEIGHTS = 2**21, 2**26
"""Numbers in the weights of one part: 8 MiB, which a CPU's caches hold; what keeps a GPU busy."""

KEPT_WEIGHTS = 2**24
"""Most numbers in weights that are kept: 64 MiB, where making them again takes a seventh of the time."""


@dataclass(frozen=True, slots=True)
class _Weights:
    """Weights of one part, not normalised."""

    local: Tensor
    """(h, b, N, L)."""
    bank: Tensor
    """(h, b, N, M)."""
    local_total: Tensor
    """(h, b, N, 1): the sum of a softmax's weights, 1 where it has none."""
    bank_total: Tensor
    """(h, b, N, 1); where joint, the same as `local_total`: the sum of both."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Some heads h of some batch elements b; all wide, q scaled already."""

    at: tuple[slice, slice]
    """Batch elements, heads."""
    q: Tensor
    """(h, b, N, D)."""
    k: Tensor
    """(h, b, L, D)."""
    v: Tensor
    """(h, b, L, D)."""
    bank_k: Tensor
    """(h, M, D)."""
    bank_v: Tensor
    """(h, M, D)."""
    bias: Tensor | None
    """(h, 1, M)."""
    gate: Tensor | None
    """(h, b, N, 1)."""

    def of(self, x: Tensor) -> Tensor:
        """Return this part of x (B, H, N) or (B, H, N, D), heads first."""
        return x[self.at].transpose(0, 1)


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return attention and log-sum-exp, both differentiable once."""
    p = problem
    batch, heads, queries, length, slots, _ = p.sizes
    keep = torch.is_grad_enabled() and batch * heads * queries * (length + slots) <= KEPT_WEIGHTS
    out, lse = _Attention.apply(p.q, p.k, p.v, p.bank_k, p.bank_v, p.bias, p.gate, p.scale, keep)
    return out, lse


class _Attention(torch.autograd.Function):
    """Both passes, for autograd."""

    @staticmethod
    def forward(
        ctx: "_Context",
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bank_k: Tensor,
        bank_v: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        scale: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        kept: list[_Weights] | None = [] if keep and any(ctx.needs_input_grad) else None
        out, lse = _forward(Problem(q, k, v, bank_k, bank_v, bias, gate, scale, "ieee"), kept)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        weights = (x for w in kept or () for x in (w.local, w.bank, w.local_total, w.bank_total))
        # where gated, backward reads no output: nothing keeps it in memory
        ctx.save_for_backward(q, k, v, bank_k, bank_v, bias, gate, out if gate is None else None, lse, *weights)
        return out, lse if gate is not None else lse[0]

    @staticmethod
    @once_differentiable(NAME)
    def backward(ctx: "_Context", dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bank_k, bank_v, bias, gate, out, lse, *weights = ctx.saved_tensors
        kept = [_Weights(*weights[i : i + 4]) for i in range(0, len(weights), 4)]
        problem = Problem(q, k, v, bank_k, bank_v, bias, gate, ctx.scale, "ieee")
        dout = torch.zeros_like(q) if dout is None else dout
        dlse = torch.zeros_like(lse) if dlse is None else dlse.view_as(lse)
        with torch.autocast(q.device.type, enabled=False):  # it may be on around backward() too
            got = _backward(problem, out, lse, dout, dlse, Wanted(*ctx.needs_input_grad[:7]), kept)
        return got.q, got.k, got.v, got.bank_k, got.bank_v, got.bias, got.gate, None, None


class _Context(Protocol):
    """What autograd keeps from the forward pass for the backward pass."""

    scale: float
    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...
    def set_materialize_grads(self, value: bool, /) -> None: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def _forward(problem: Problem, kept: list[_Weights] | None) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp (S, B, H, N) of the S softmaxes; append the weights to `kept`."""
    if kept is None and fused.suits(problem):
        return fused.forward(problem)
    out = dense_like(problem.q)
    lse = out.new_empty((1 if problem.gate is None else 2, *out.shape[:3]), dtype=problem.wide)
    for part in _parts(problem):
        local, bank = _logits(part)
        total, sums = _exponentiate(local, bank) if part.gate is None else _exponentiate(local)
        part.of(lse[0]).copy_(sums)
        bank_total = total
        if part.gate is not None:
            bank_total, sums = _exponentiate(bank)
            part.of(lse[1]).copy_(sums)
        bank_mean = _times(bank, part.bank_v)
        if part.gate is not None:
            bank_mean.mul_(part.gate * total / bank_total)
        part.of(out).copy_(_times(local, part.v).add_(bank_mean).div_(total))
        if kept is not None:
            kept.append(_Weights(local, bank, total, bank_total))
    return out, lse


def _backward(
    problem: Problem,
    out: Tensor | None,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    wanted: Wanted,
    kept: Sequence[_Weights],
) -> Gradients:
    """Return the wanted gradients; output is not needed where gated, log-sum-exp and its gradient are (S, B, H, N)."""
    got = unfilled_gradients(problem, wanted)
    of_bank = [None if x is None else torch.zeros_like(x, dtype=lse.dtype) for x in (got.bank_k, got.bank_v, got.bias)]
    for i, part in enumerate(_parts(problem)):
        w = kept[i] if kept else _weights(part, lse)
        g = part.of(dout).to(lse.dtype)
        # dividing what multiplies the weights costs less than dividing the weights
        local_g = bank_g = g / w.local_total
        if part.gate is not None:
            bank_g = g / w.bank_total
        slopes, bank_slopes, dgate = _slopes(part, w, (g, local_g, bank_g), out, dlse)
        if part.gate is not None:
            bank_g.mul_(part.gate)
        if got.q is not None:
            part.of(got.q).copy_(_times(slopes, part.k).add_(_times(bank_slopes, part.bank_k)).mul_(problem.scale))
        if got.k is not None:
            part.of(got.k).copy_(_times(slopes.mT, part.q))
        if got.v is not None:
            part.of(got.v).copy_(_times(w.local.mT, local_g))
        if got.gate is not None and dgate is not None:
            part.of(got.gate).copy_(dgate.squeeze(-1))
        _add_bank(part, of_bank, w.bank, bank_slopes, bank_g)
    for x, total in zip((got.bank_k, got.bank_v, got.bias), of_bank, strict=True):
        if x is not None and total is not None:
            x.copy_(total)
    return got


def _weights(part: _Part, lse: Tensor) -> _Weights:
    """Return weights made again, normalised; 0 where a row has no live key."""
    local, bank = _logits(part)
    finite = [torch.where(x == -torch.inf, torch.inf, x)[..., None] for x in map(part.of, lse)]
    one = torch.ones_like(finite[0])
    return _Weights(local.sub_(finite[0]).exp_(), bank.sub_(finite[-1]).exp_(), one, one)


def _slopes(
    part: _Part, w: _Weights, g: tuple[Tensor, Tensor, Tensor], out: Tensor | None, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of local and bank logits, and of the gate (h, b, N, 1).

    g is the gradient of the output (h, b, N, D), and the same over the local and the bank's total.
    """
    slopes, bank_slopes = _times(g[1], part.v.mT), _times(g[2], part.bank_v.mT)
    dsums = [part.of(x)[..., None] for x in dlse]
    if part.gate is None:
        assert out is not None
        delta = (part.of(out) * g[0]).sum(-1, keepdim=True).sub_(dsums[0]).div_(w.local_total)
        return slopes.sub_(delta).mul_(w.local), bank_slopes.sub_(delta).mul_(w.bank), None
    delta = (slopes * w.local).sum(-1, keepdim=True).sub_(dsums[0]).div_(w.local_total)
    dgate = (bank_slopes * w.bank).sum(-1, keepdim=True)
    bank_delta = (part.gate * dgate - dsums[1]).div_(w.bank_total)
    bank_slopes.mul_(part.gate).sub_(bank_delta).mul_(w.bank)
    return slopes.sub_(delta).mul_(w.local), bank_slopes, dgate


def _add_bank(part: _Part, totals: Sequence[Tensor | None], weights: Tensor, slopes: Tensor, g: Tensor) -> None:
    """Add a part to the gradients of bank_k, bank_v and bias; g is times gate and over total."""
    of_k, of_v, of_bias = (None if x is None else x[part.at[1]] for x in totals)
    if of_k is not None:
        of_k.baddbmm_(slopes.flatten(1, 2).mT, part.q.flatten(1, 2))
    if of_v is not None:
        of_v.baddbmm_(weights.flatten(1, 2).mT, g.flatten(1, 2))
    if of_bias is not None:
        of_bias.add_(slopes.sum((1, 2)))


def _parts(problem: Problem) -> Iterator[_Part]:
    """Yield parts with few enough weights, at least one head of one batch element each."""
    p, work = problem, problem.wide
    batch, heads, queries, length, slots, _ = p.sizes
    limit = CPU_WEIGHTS if p.q.device.type == "cpu" else GPU_WEIGHTS
    pairs = max(1, limit // max(1, queries * (length + slots)))
    for h in _slices(heads, pairs // max(1, batch)):
        bank_k, bank_v = p.bank_k[h].to(work), p.bank_v[h].to(work)
        bias = None if p.bias is None else p.bias[h, None]
        for b in _slices(batch, pairs):
            q, k, v = (x[b, h].transpose(0, 1).to(work) for x in (p.q, p.k, p.v))
            gate = None if p.gate is None else p.gate[b, h].transpose(0, 1)[..., None]
            yield _Part((b, h), q * p.scale, k, v, bank_k, bank_v, bias, gate)


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + max(1, step)) for start in range(0, count, max(1, step)))


def _logits(part: _Part) -> tuple[Tensor, Tensor]:
    """Return the logits of local keys (h, b, N, L) and of the bank (h, b, N, M)."""
    bank = _times(part.q, part.bank_k.mT)
    return _times(part.q, part.k.mT), bank if part.bias is None else bank.add_(part.bias[:, None])


def _times(x: Tensor, y: Tensor) -> Tensor:
    """Return x (h, b, I, K) times y (h, b, K, J), or times y (h, K, J), one product a head."""
    h, b, i, k = x.shape
    if y.dim() == 4:
        return torch.bmm(x.reshape(h * b, i, k), y.reshape(h * b, k, y.shape[3])).view(h, b, i, y.shape[3])
    return torch.bmm(x.reshape(h, b * i, k), y).view(h, b, i, y.shape[2])


def _exponentiate(*logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits that share a softmax into weights; return their total (h, b, N, 1) and log-sum-exp (h, b, N).

    Where no logit is above -inf the weights are 0, their total is 1, and the log-sum-exp is -inf.
    """
    tops = [x.amax(-1, keepdim=True) for x in logits if x.shape[-1]]
    pivot = torch.stack(tops).amax(0) if tops else logits[0].new_full((*logits[0].shape[:-1], 1), -torch.inf)
    pivot = torch.where(pivot == -torch.inf, 0.0, pivot)
    total = sum((x.sub_(pivot).exp_().sum(-1, keepdim=True) for x in logits), torch.zeros_like(pivot))
    dead = total == 0
    lse = torch.where(dead, -torch.inf, pivot + torch.log(total))
    return torch.where(dead, 1.0, total), lse.squeeze(-1)
