"""The forward pass on a CPU by PyTorch's own fused attention: over local keys, over the bank, then merged.

With lse_l, lse_g the two log-sum-exps and w = sigmoid(lse_l - lse_g) one softmax over all keys is

    out = w out_l + (1 - w) out_g        lse = log(e^lse_l + e^lse_g)

(the partial softmaxes of FlashAttention, Dao et al. 2022, section 3.1, arXiv 2205.14135). All rows of a head
meet the bank as one batch element, so neither weights nor expanded banks are held.
"""

import torch
from torch import Tensor

from fedoap.kernels.dca.problem import Problem, dense_like, inner_contiguous

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def suits(problem: Problem) -> bool:
    """Return whether PyTorch has such a kernel for these tensors."""
    batch, heads, queries, length, _, channels = problem.sizes
    is_known = problem.q.device.type == "cpu" and problem.q.dtype == torch.float32
    # given nothing to do, it divides by 0: the process dies
    return is_known and min(batch, heads, queries, length, channels) > 0


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp (S, B, H, N) of the S softmaxes, for tensors that it suits."""
    p = problem
    batch, heads, queries, _, slots, channels = p.sizes
    # the kernel takes for granted, unchecked, that channels lie side by side
    q, k, v, bank_k, bank_v = map(inner_contiguous, (p.q, p.k, p.v, p.bank_k, p.bank_v))
    local, local_lse = _attention(q, k, v, scale=p.scale)
    if slots == 0:
        nothing = [torch.full_like(local_lse, -torch.inf)] if p.gate is not None else []
        return dense_like(p.q).copy_(local), torch.stack([local_lse, *nothing])
    rows = q.transpose(0, 1).reshape(1, heads, batch * queries, channels)
    mask = None if p.bias is None else p.bias[None, :, None].expand(-1, -1, batch * queries, -1)
    bank, bank_lse = _attention(rows, bank_k[None], bank_v[None], attn_mask=mask, scale=p.scale)
    bank = bank.view(heads, batch, queries, channels).transpose(0, 1)
    bank_lse = bank_lse.view(heads, batch, queries).transpose(0, 1)
    if p.bias is not None:
        # what the kernel gives for rows without any key differs between versions
        dead = (p.bias == -torch.inf).all(-1)[:, None]
        bank_lse = torch.where(dead, -torch.inf, bank_lse)
        bank = torch.where(dead[..., None], 0.0, bank)
    out = dense_like(p.q)
    if p.gate is not None:
        return torch.addcmul(local, p.gate[..., None], bank, out=out), torch.stack((local_lse, bank_lse))
    torch.lerp(bank, local, torch.sigmoid(local_lse - bank_lse)[..., None], out=out)
    return out, torch.logaddexp(local_lse, bank_lse)[None]
