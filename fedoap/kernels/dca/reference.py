"""Decoupled cross-attention in plain PyTorch: what every other backend must reproduce.

B batch, H heads, N queries, L local keys, M bank slots, D channels. In parts, by `cached`; as one expression
whose gradients autograd derives where a compiler looks on.
"""

import torch
from torch import Tensor

from fedoap.kernels.dca import cached
from fedoap.kernels.dca.problem import Problem, ordered_like


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return attention and log-sum-exp, both differentiable."""
    # a compiler fuses the plain form better than it follows a loop over parts
    return _plain(problem) if torch.compiler.is_compiling() else cached.attend(problem)


def _plain(problem: Problem) -> tuple[Tensor, Tensor]:
    work = problem.wide
    q = problem.q.to(work) * problem.scale
    k, v, bank_k, bank_v = (x.to(work) for x in (problem.k, problem.v, problem.bank_k, problem.bank_v))
    local, bank = q @ k.mT, _by_head(q, bank_k.mT)  # (B, H, N, L), (B, H, N, M)
    if problem.bias is not None:
        bank = bank + problem.bias[:, None]
    if problem.gate is None:
        out, lse = _joint(local, bank, v, bank_v)
    else:
        out, lse = _gated(local, bank, v, bank_v, problem.gate)
    return ordered_like(out.to(problem.q.dtype), problem.q), lse


def _joint(local: Tensor, bank: Tensor, v: Tensor, bank_v: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention and log-sum-exp of one softmax over local and bank logits."""
    length = local.shape[-1]
    weights, total, lse = _softmax(torch.cat([local, bank], -1))
    return (weights[..., :length] @ v + _by_head(weights[..., length:], bank_v)) / total, lse


def _gated(local: Tensor, bank: Tensor, v: Tensor, bank_v: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return local attention plus gate times bank attention, and the two log-sum-exps stacked."""
    weights, total, local_lse = _softmax(local)
    own = weights @ v / total
    weights, total, bank_lse = _softmax(bank)
    return own + gate[..., None] * _by_head(weights, bank_v) / total, torch.stack([local_lse, bank_lse])


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
