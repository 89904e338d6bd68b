"""What decoupled cross-attention refuses, each in one line of subject, value and expectation."""

from typing import get_args

import torch
from torch import Tensor

from fedoap.kernels.dca.problem import AttentionMode, Precision

NAME = "decoupled_cross_attention"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_options(mode: AttentionMode, gate: Tensor | None, precision: Precision | None) -> None:
    """Refuse unknown options and a gate that mode does not take.

    Raises:
        ValueError: one of them.
    """
    if mode not in get_args(AttentionMode):
        raise ValueError(f"{NAME}: mode is {mode!r}, but must be one of {', '.join(get_args(AttentionMode))}")
    if (gate is not None) != (mode == "gated"):
        raise ValueError(f"{NAME}: gate is {'missing' if gate is None else 'given'}, but mode is {mode!r}")
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(f"{NAME}: precision is {precision!r}, but must be one of {', '.join(get_args(Precision))}")


def check_eager_precision(q: Tensor, precision: Precision | None) -> None:
    """Refuse a precision where the eager backend cannot keep it.

    Raises:
        ValueError: one is given for an accelerator, where products follow PyTorch's setting.
    """
    if precision is not None and q.device.type != "cpu":
        raise ValueError(
            f"{NAME}: precision is {precision!r}, but eager products on {q.device.type} follow PyTorch's setting"
        )


def check_tokens(q: Tensor, k: Tensor, v: Tensor, bank_k: Tensor, bank_v: Tensor) -> None:
    """Refuse tokens whose shapes, dtypes or devices do not fit each other.

    Raises:
        ValueError: the first that does not.
    """
    if q.dim() != 4:
        raise ValueError(f"{NAME}: q has shape {tuple(q.shape)}, but must be (batch, heads, queries, channels)")
    if q.dtype not in _DTYPES:
        raise ValueError(f"{NAME}: q is {q.dtype}, but must be a float of 16 to 64 bits")
    batch, heads, _, channels = q.shape
    length = k.shape[2] if k.dim() == 4 else "keys"
    slots = bank_k.shape[1] if bank_k.dim() == 3 else "slots"
    for name, tensor in (("k", k), ("v", v)):
        _check_token(name, tensor, q, (batch, heads, length, channels))
    for name, tensor in (("bank_k", bank_k), ("bank_v", bank_v)):
        _check_token(name, tensor, q, (heads, slots, channels))


def check_bias_and_gate(q: Tensor, bank_k: Tensor, slot_bias: Tensor | None, gate: Tensor | None) -> None:
    """Refuse a bias or a gate that does not fit the tokens.

    Raises:
        ValueError: one of them does not.
    """
    (batch, heads, queries, _), slots = q.shape, bank_k.shape[1]
    if slot_bias is not None:
        _check_like("slot_bias", slot_bias, q)
        shape = tuple(slot_bias.shape)
        if shape not in ((slots,), (heads, slots)):
            raise ValueError(f"{NAME}: slot_bias has shape {shape}, but must be ({slots},) or ({heads}, {slots})")
    if gate is not None:
        _check_like("gate", gate, q)
        shape, rows = tuple(gate.shape), (batch, heads, queries)
        if shape != (heads,) and not _broadcasts(shape, rows):
            raise ValueError(f"{NAME}: gate has shape {shape}, but must be ({heads},) or broadcast to {rows}")


def _check_token(name: str, tensor: Tensor, q: Tensor, shape: tuple[int | str, ...]) -> None:
    if tuple(tensor.shape) != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{NAME}: {name} has shape {tuple(tensor.shape)}, but must be ({expected})")
    _check_like(name, tensor, q)
    if tensor.dtype != q.dtype:
        raise ValueError(f"{NAME}: {name} is {tensor.dtype}, but q is {q.dtype}")


def _check_like(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{NAME}: {name} is on {tensor.device}, but q is on {q.device}")
    if not tensor.is_floating_point():
        raise ValueError(f"{NAME}: {name} is {tensor.dtype}, but must be a float")


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        own in (1, wanted) for own, wanted in zip(reversed(shape), reversed(target), strict=False)
    )
