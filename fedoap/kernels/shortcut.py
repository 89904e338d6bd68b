"""When a call may go round PyTorch's dispatcher.

Passing an operator written in Python through it takes longer than a small kernel runs. The dispatcher is
needed by whatever looks on or stands in for tensors: compilers, tracers, modes, transforms, subclasses.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = frozenset({Tensor, Parameter})


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether nothing but autograd concerns itself with these tensors."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    # a view like `z.conj().imag` has its sign flipped by the dispatcher, not in memory
    return all(x is None or (type(x) in _PLAIN and not x.is_neg()) for x in tensors)


def asks_for_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd is to follow a call with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def refuse_tangents(operation: str, *tensors: Tensor | None) -> None:
    """Refuse forward-mode differentiation, which PyTorch would take for a derivative of 0.

    Raises:
        NotImplementedError: one of the tensors carries a tangent.
    """
    # outside of forward_ad.dual_level, where nearly all calls are, this costs nothing
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"{operation}: an input carries a tangent, but kernels have no forward-mode derivative"
        )
