"""Decoupled cross-attention as two operators of PyTorch, run by Triton kernels.

B batch, H heads, N queries, L local keys, M bank slots, D channels of a head.

    fedoap::dca_forward    out, lse and what a backward pass needs; differentiable once
    fedoap::dca_backward   the wanted gradients

Two routes lead to the same result. `flash` keeps weights in registers: best while a row of D channels
fits there. `wide` lets them pass through memory: for large D, and for products more precise than
tf32, whose operands take more registers than there are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, Protocol, TypeAlias

import torch
from torch import Tensor

from fedoap.kernels.dca.checks import NAME
from fedoap.kernels.dca.problem import (
    Attended,
    Gradients,
    Precision,
    Problem,
    Wanted,
    inner_contiguous,
    unfilled,
    unfilled_gradients,
)
from fedoap.kernels.dca.tiles import BACKWARD_CHANNELS, FORWARD_CHANNELS, Numbers, numbers
from fedoap.kernels.shortcut import asks_for_gradient, is_plain, refuse_tangents

Saved: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""out, lse, local_out, bank_out, weights, pivots of `Attended`; empty for None, which operators cannot return."""

Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""The tensors of a `Problem`."""

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor bank_k, Tensor bank_v, Tensor? bias, Tensor? gate, float scale, str precision"
)
_SAVED = "(Tensor out, Tensor lse, Tensor local_out, Tensor bank_out, Tensor weights, Tensor pivots)"
_BACK = "Tensor[] saved, Tensor dout, Tensor? dlse, bool[] wanted"


def attend(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return attention and log-sum-exp, both differentiable once."""
    p = problem
    q, k, v, bank_k, bank_v = map(inner_contiguous, (p.q, p.k, p.v, p.bank_k, p.bank_v))
    tensors = (q, k, v, bank_k, bank_v, p.bias, p.gate)
    refuse_tangents(NAME, *tensors)
    if not is_plain(*tensors):
        out, lse, *_ = dca_forward(*tensors, p.scale, p.precision)
    elif asks_for_gradient(*tensors):
        out, lse = _Attention.apply(*tensors, p.scale, p.precision)
    else:
        out, lse, *_ = _forward(*tensors, p.scale, p.precision)
    return out, lse


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bank_k: Tensor,
    bank_v: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: float,
    precision: Precision,
) -> Saved:
    """Return attention, log-sum-exp and what a backward pass needs."""
    problem = Problem(q, k, v, bank_k, bank_v, bias, gate, scale, precision)
    if q.numel() == 0:
        return _saved(unfilled(problem))
    with torch.cuda.device_of(q):
        if _is_flash(problem, FORWARD_CHANNELS):
            from fedoap.kernels.dca import flash_forward  # noqa: PLC0415 - imports triton

            return _saved(flash_forward.forward(problem))
        from fedoap.kernels.dca import wide_forward  # noqa: PLC0415 - imports triton

        return _saved(wide_forward.forward(problem))


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bank_k: Tensor,
    bank_v: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: float,
    precision: Precision,
) -> Saved:
    problem = Problem(q, k, v, bank_k, bank_v, bias, gate, scale, precision)
    out, lse, local_out, bank_out, weights, pivots = _saved(unfilled(problem))
    if q.numel() > 0 and not _is_flash(problem, FORWARD_CHANNELS):
        from fedoap.kernels.dca import wide_tiles  # noqa: PLC0415 - no other route needs it

        tiles = -(-k.shape[2] // wide_tiles.KEYS) + -(-bank_k.shape[1] // wide_tiles.KEYS)
        if 0 < tiles * wide_tiles.KEYS <= q.shape[3]:
            weights = q.new_empty((*q.shape[:3], tiles * wide_tiles.KEYS))
            pivots = q.new_empty((*q.shape[:2], tiles, q.shape[2]), dtype=problem.wide)
    return out, lse, local_out, bank_out, weights, pivots


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bank_k: Tensor,
    bank_v: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: float,
    precision: Precision,
    saved: Sequence[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Return the wanted gradients, in the order of the arguments."""
    problem = Problem(q, k, v, bank_k, bank_v, bias, gate, scale, precision)
    asked = Wanted(*wanted)
    if q.numel() == 0:
        return [x.zero_() for x in _given(unfilled_gradients(problem, asked))]
    with torch.cuda.device_of(q):
        if _is_flash(problem, BACKWARD_CHANNELS):
            from fedoap.kernels.dca import flash_backward  # noqa: PLC0415 - imports triton

            return _given(flash_backward.backward(problem, _attended(saved), dout, dlse, asked))
        from fedoap.kernels.dca import wide_backward  # noqa: PLC0415 - imports triton

        return _given(wide_backward.backward(problem, _attended(saved), dout, dlse, asked))


def _fake_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bank_k: Tensor,
    bank_v: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    scale: float,
    precision: Precision,
    saved: Sequence[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    problem = Problem(q, k, v, bank_k, bank_v, bias, gate, scale, precision)
    return _given(unfilled_gradients(problem, Wanted(*wanted)))


class _Context(Protocol):
    """What autograd keeps from a forward pass for its backward pass."""

    scale: float
    precision: Precision
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def set_materialize_grads(self, value: bool, /) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Attention(torch.autograd.Function):
    """The same without the dispatcher; what is kept is no output here."""

    @staticmethod
    def forward(ctx: _Context, *inputs: *tuple[*Tensors, float, Precision]) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def backward(ctx: _Context, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, dout, dlse)


def _keep(ctx: _Context, inputs: tuple[*Tensors, float, Precision], output: Saved) -> None:
    ctx.mark_non_differentiable(*output[2:])
    _save(ctx, inputs, output)


def _save(ctx: _Context, inputs: tuple[*Tensors, float, Precision], output: Saved) -> None:
    *tensors, ctx.scale, ctx.precision = inputs
    ctx.set_materialize_grads(False)
    out, lse, local_out, *others = output
    # where gated, only its two parts are read again: nothing keeps the output itself in memory
    ctx.save_for_backward(*tensors, local_out if local_out.numel() else out, lse, local_out, *others)


def _differentiate(
    ctx: _Context, dout: Tensor | None, dlse: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors, saved = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    wanted = ctx.needs_input_grad[:7]
    dout = torch.zeros_like(saved[0]) if dout is None else dout
    # under create_graph the operator itself refuses to be differentiated
    is_direct = not torch.is_grad_enabled() and is_plain(dout, dlse, *tensors)
    call: Callable[..., list[Tensor]] = _backward if is_direct else dca_backward
    gradients = iter(call(*tensors, ctx.scale, ctx.precision, saved, dout, dlse, wanted))
    return (*(next(gradients) if want else None for want in wanted), None, None)


def _refuse(ctx: object, *_: object) -> NoReturn:
    raise RuntimeError(f"{NAME}: its gradient is differentiated, but has no derivative in Triton")


def _is_flash(problem: Problem, channels: Mapping[Numbers, int]) -> bool:
    """Return whether the flash route takes this problem, if it takes so many channels."""
    accurate = problem.q.dtype == torch.float32 and problem.precision != "tf32"
    return problem.q.shape[3] <= channels[numbers(problem.q.dtype)] and not accurate


def _saved(attended: Attended) -> Saved:
    a = attended
    absent = (a.out.new_empty(0) if x is None else x for x in (a.local_out, a.bank_out, a.weights, a.pivots))
    local_out, bank_out, weights, pivots = absent
    return a.out, a.lse, local_out, bank_out, weights, pivots


def _attended(saved: Sequence[Tensor]) -> Attended:
    out, lse, *others = saved
    return Attended(out, lse, *(x if x.numel() else None for x in others))


def _given(gradients: Gradients) -> list[Tensor]:
    g = gradients
    bank = (x if x is None else x.contiguous() for x in (g.bank_k, g.bank_v))
    return [x for x in (g.q, g.k, g.v, *bank, g.bias, g.gate) if x is not None]


# torch.library.custom_op registers the same and takes longer a call: at small sizes that is what a user waits for
_LIBRARY = torch.library.Library("fedoap", "FRAGMENT")
_LIBRARY.define(f"dca_forward({_CALL}) -> {_SAVED}")
_LIBRARY.define(f"dca_backward({_CALL}, {_BACK}) -> Tensor[]")
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("dca_forward", _forward, _device)
    _LIBRARY.impl("dca_backward", _backward, _device)
torch.library.register_fake("fedoap::dca_forward", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("fedoap::dca_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("fedoap::dca_forward", _differentiate, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd("fedoap::dca_backward", _refuse, lib=_LIBRARY)

dca_forward = torch.ops.fedoap.dca_forward.default
dca_backward = torch.ops.fedoap.dca_backward.default
