"""Decoupled cross-attention and its gradients in float64, written from the formula for tests.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.
"""

from dataclasses import fields, replace

import torch
from torch import Tensor

from fedoap.kernels.dca.problem import Gradients, Problem

GRADIENTS = tuple(field.name for field in fields(Gradients))


def attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return output and natural log-sum-exp, summed the plain way: every weight of every query exists at once."""
    batch = problem.q.shape[0]
    bank_k, bank_v = (x.unsqueeze(0).expand(batch, -1, -1, -1) for x in (problem.bank_k, problem.bank_v))
    local = torch.einsum("bhnd,bhld->bhnl", problem.q, problem.k) * problem.scale
    bank = torch.einsum("bhnd,bhmd->bhnm", problem.q, bank_k) * problem.scale
    if problem.bias is not None:
        bank = bank + problem.bias[None, :, None, :]
    if problem.gate is None:
        return _softmax(torch.cat([local, bank], 3), torch.cat([problem.v, bank_v], 2))
    (own, own_lse), (shared, shared_lse) = _softmax(local, problem.v), _softmax(bank, bank_v)
    return own + problem.gate.unsqueeze(-1) * shared, torch.stack([own_lse, shared_lse])


def _softmax(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    live = logits > -torch.inf
    top = logits.detach().masked_fill(~live, -1e300).amax(3) if logits.shape[3] else logits.new_zeros(logits.shape[:3])
    weights = torch.where(live, (logits - top.unsqueeze(-1)).exp(), 0.0)
    total = weights.sum(3)
    dead = total == 0
    total = total.masked_fill(dead, 1.0)
    out = torch.einsum("bhnk,bhkd->bhnd", weights, values) / total.unsqueeze(-1)
    return out, torch.where(dead, -torch.inf, top + total.log())


def gradients(problem: Problem, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return output, log-sum-exp and the gradients of sum(out * dout) + sum(lse * dlse), all in float64."""
    leaves = {
        name: tensor.detach().double().requires_grad_()
        for name in GRADIENTS
        if (tensor := getattr(problem, name)) is not None
    }
    out, lse = attention(replace(problem, **leaves))
    total = (out * dout.double()).sum()
    if dlse is not None:
        total = total + (torch.where(lse > -torch.inf, lse, 0.0) * dlse.double()).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return out.detach(), lse.detach(), {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }  # fmt: skip


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    difference = torch.linalg.vector_norm(got.detach().double() - expected)
    return float(difference / torch.linalg.vector_norm(expected).clamp_min(1e-30))
