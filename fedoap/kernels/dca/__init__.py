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

from fedoap.kernels.dca.attention import decoupled_cross_attention
from fedoap.kernels.dca.problem import AttentionMode, Precision

__all__ = ["AttentionMode", "Precision", "decoupled_cross_attention"]
