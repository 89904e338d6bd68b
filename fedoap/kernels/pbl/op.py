"""The kernels as operators of PyTorch: what they return, and how gradients pass through them.

An operator takes a recipe's options one by one, as its schema demands. Triton is imported when one runs.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor

from fedoap.kernels.pbl.checks import NAME
from fedoap.kernels.pbl.problem import BoundaryParts, Element, Perturbed, Recipe, Region
from fedoap.kernels.shortcut import asks_for_gradient, is_plain, refuse_tangents

_Found: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Loss, each sample's clean loss, perturbed loss and voxels, then `sums` and `marks` of forward.Found."""


def loss_and_parts(logits: Tensor, target: Tensor, seed: Tensor, recipe: Recipe) -> tuple[Tensor, BoundaryParts]:
    """Return what `reference.loss_and_parts` does, of a batch that has voxels, by kernels."""
    options = options_of(recipe)
    refuse_tangents(NAME, logits, target)
    if not is_plain(logits, target, seed):
        loss, clean, perturbed, voxels, *_ = pbl_forward(logits, target, seed, *options)
    elif asks_for_gradient(logits):
        loss, clean, perturbed, voxels = _Loss.apply(logits, target, seed, *options)
    else:
        loss, clean, perturbed, voxels, *_ = _forward(logits, target, seed, *options)
    return loss, BoundaryParts(clean, perturbed, voxels)


def perturb(logits: Tensor, target: Tensor, seed: Tensor, recipe: Recipe) -> Perturbed:
    """Return what `reference.perturb` does, of a batch that has voxels, by a kernel."""
    refuse_tangents(NAME, logits, target)
    noisy, region = perturbed_boundary(logits, target, seed, *options_of(recipe))
    return Perturbed(region, noisy)


def options_of(recipe: Recipe) -> tuple[str, int, str, float, float, float, float]:
    """Return a recipe's options as operators take them."""
    return (recipe.region, recipe.radius, recipe.element, recipe.tau, recipe.sigma, recipe.lam, recipe.smooth)


def recipe_of(region: str, radius: int, element: str, tau: float, sigma: float, lam: float, smooth: float) -> Recipe:
    """Return the recipe of an operator's options."""
    # a schema knows no Literal; the public functions have checked the names
    return Recipe(cast("Region", region), radius, cast("Element", element), tau, sigma, lam, smooth)


def _forward(
    logits: Tensor, target: Tensor, seed: Tensor, region: str, radius: int, element: str, tau: float, sigma: float,
    lam: float, smooth: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, its parts, and what the backward pass needs."""
    from fedoap.kernels.pbl.forward import forward  # noqa: PLC0415

    found = forward(logits, target, seed, recipe_of(region, radius, element, tau, sigma, lam, smooth))
    return found.loss, found.clean, found.perturbed, found.voxels, found.sums, found.marks


pbl_forward = torch.library.custom_op("fedoap::pbl_forward", _forward, mutates_args=())


@pbl_forward.register_fake
def _(
    logits: Tensor, target: Tensor, seed: Tensor, region: str, radius: int, element: str, tau: float, sigma: float,
    lam: float, smooth: float,
) -> _Found:  # fmt: skip
    batch, *planes, width = logits.shape[0], *logits.shape[2:]
    lines = planes[0] if len(planes) == 1 else planes[0] * planes[1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    loss, clean, noisy, sums = (logits.new_empty(shape, dtype=dtype) for shape in ((), batch, batch, (batch, 5)))
    marked = recipe_of(region, radius, element, tau, sigma, lam, smooth).marked
    marks = logits.new_empty((batch, lines, (width + 31) // 32) if marked else 0, dtype=torch.int32)
    return loss, clean, noisy, logits.new_empty(batch, dtype=torch.int64), sums, marks


def _backward(
    grad: Tensor, logits: Tensor, target: Tensor, seed: Tensor, sums: Tensor, marks: Tensor, region: str, radius: int,
    element: str, tau: float, sigma: float, lam: float, smooth: float,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits; it has no derivative itself."""
    from fedoap.kernels.pbl.backward import backward  # noqa: PLC0415

    recipe = recipe_of(region, radius, element, tau, sigma, lam, smooth)
    return backward(grad, logits, target, seed, sums, marks, recipe)


pbl_backward = torch.library.custom_op("fedoap::pbl_backward", _backward, mutates_args=())


@pbl_backward.register_fake
def _(
    grad: Tensor, logits: Tensor, target: Tensor, seed: Tensor, sums: Tensor, marks: Tensor, region: str, radius: int,
    element: str, tau: float, sigma: float, lam: float, smooth: float,
) -> Tensor:  # fmt: skip
    return logits.new_empty(logits.shape)


class _Loss(torch.autograd.Function):
    """The same without the dispatcher; what is kept is no output here."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *inputs: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _forward(*inputs)  # type: ignore[arg-type]
        ctx.mark_non_differentiable(*output[1:4])
        _save(ctx, inputs, output)
        return output[:4]

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, *_: object
    ) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, grad)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: Sequence[object], output: _Found) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, output)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: Sequence[object], output: _Found) -> None:
    logits, target, seed, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, seed, *output[4:])  # type: ignore[arg-type]
    ctx.options = options  # type: ignore[attr-defined]


def _gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    tensors: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
    # under create_graph the operator itself refuses to be differentiated
    is_direct = not torch.is_grad_enabled() and is_plain(grad, *tensors)
    call: Callable[..., Tensor] = _backward if is_direct else pbl_backward
    dz = call(grad, *tensors, *ctx.options)  # type: ignore[attr-defined]
    return (dz, *(None,) * 9)


pbl_forward.register_autograd(_gradient, setup_context=_keep)


@torch.library.custom_op("fedoap::perturbed_boundary", mutates_args=())
def perturbed_boundary(
    logits: Tensor, target: Tensor, seed: Tensor, region: str, radius: int, element: str, tau: float, sigma: float,
    lam: float, smooth: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the perturbed logits, whose gradient is that of the logits, and the region."""
    from fedoap.kernels.pbl.extraction import extract  # noqa: PLC0415

    found, noisy = extract(logits, target, seed, recipe_of(region, radius, element, tau, sigma, lam, smooth))
    return noisy, found


@perturbed_boundary.register_fake
def _(
    logits: Tensor, target: Tensor, seed: Tensor, region: str, radius: int, element: str, tau: float, sigma: float,
    lam: float, smooth: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(logits.shape, dtype=dtype), logits.new_empty(logits.shape, dtype=torch.bool)


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: Sequence[object], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.dtype = inputs[0].dtype  # type: ignore[attr-defined]


def _pass_on(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, _: object) -> tuple[Tensor | None, ...]:
    return (None if grad is None else grad.to(ctx.dtype), *(None,) * 9)  # type: ignore[attr-defined]


perturbed_boundary.register_autograd(_pass_on, setup_context=_remember)
