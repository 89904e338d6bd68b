"""When a call may go round PyTorch's dispatcher.

Passing an operator written in Python through it takes longer than a small kernel runs. The dispatcher is
needed by whatever looks on or stands in for tensors: compilers, tracers, modes, transforms, subclasses.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN = frozenset({Tensor, Parameter})


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether nothing but autograd concerns itself with these tensors."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(x is None or type(x) in _PLAIN for x in tensors)


def asks_for_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd is to follow a call with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
