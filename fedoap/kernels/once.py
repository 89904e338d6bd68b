"""Gradients that say so where somebody differentiates them.

PyTorch's decorator of this name speaks up only where the incoming gradient asks for a derivative. That of a loss is
a constant 1: with it `autograd.grad(loss, z, create_graph=True)` gives what would count as a constant, and a penalty
on the gradient would train nothing.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

Gradients: TypeAlias = tuple[Tensor | None, ...]


def once_differentiable(operation: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Let the gradients of an operation's backward pass raise RuntimeError in a backward pass of their own."""

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @wraps(backward)
        def run(ctx: Any, *incoming: Tensor | None) -> Gradients:
            with torch.no_grad():
                gradients = backward(ctx, *incoming)
            if not torch.is_grad_enabled():
                return gradients
            # outputs ask for a derivative where an input does, at the least an empty one
            asking = [x for x in ctx.saved_tensors if x is not None and x.requires_grad]
            asking = asking or [torch.empty(0, requires_grad=True)]
            final: Gradients = _Final.apply(operation, len(asking), *asking, *gradients)
            return final

        return run

    return decorate


class _Final(torch.autograd.Function):
    """Hands gradients on, whose own backward pass raises."""

    @staticmethod
    def forward(ctx: Any, operation: str, asking: int, *tensors: Tensor | None) -> Gradients:
        ctx.operation = operation
        return tuple(None if x is None else x.detach() for x in tensors[asking:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> NoReturn:
        raise RuntimeError(f"{ctx.operation}: its gradient is differentiated, but has no derivative")
