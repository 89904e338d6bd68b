"""Every refusal of the perturbed boundary loss, each in one line."""

import math
from typing import get_args

import torch
from torch import Tensor

from fedoap.kernels.pbl.problem import Element, Recipe, Region

NAME = "perturbed_boundary_loss"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def seed_on(seed: Tensor | int, device: torch.device) -> Tensor:
    """Return the seed as one int64 value on the device."""
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"{NAME}: seed is {seed}, but must fit 64 bits")
        return torch.full((), seed, dtype=torch.int64, device=device)  # copies nothing from the host
    if not isinstance(seed, Tensor):
        raise ValueError(f"{NAME}: seed is {seed!r}, but must be an int or one int64")  # noqa: TRY004 - as all refusals
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"{NAME}: seed is {seed.dtype} of {seed.numel()} elements, but must be one int64")
    if seed.device != device:
        raise ValueError(f"{NAME}: seed is on {seed.device}, but the logits are on {device}")
    return seed.reshape(())


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError for the first option out of range."""
    if recipe.region not in get_args(Region):
        raise ValueError(f"{NAME}: region is {recipe.region!r}, but must be one of {', '.join(get_args(Region))}")
    if recipe.element not in get_args(Element):
        raise ValueError(f"{NAME}: element is {recipe.element!r}, but must be one of {', '.join(get_args(Element))}")
    if recipe.radius < 0:
        raise ValueError(f"{NAME}: radius is {recipe.radius}, but must be 0 or more")
    if not 0 < recipe.tau < 1:
        raise ValueError(f"{NAME}: tau is {recipe.tau}, but must lie between 0 and 1")
    if not 0 <= recipe.sigma < math.inf:
        raise ValueError(f"{NAME}: sigma is {recipe.sigma}, but must be 0 or more")
    if not 0 <= recipe.lam <= 1:
        raise ValueError(f"{NAME}: lam is {recipe.lam}, but must lie in [0, 1]")
    if not 0 < recipe.smooth < math.inf:
        raise ValueError(f"{NAME}: smooth is {recipe.smooth}, but must be above 0")


def check_tensors(logits: Tensor, target: Tensor) -> None:
    """Raise ValueError for shapes, dtypes or devices that do not fit, and for values outside [0, 1]."""
    shape = tuple(logits.shape)
    if len(shape) not in (4, 5) or shape[1] != 1:
        raise ValueError(f"{NAME}: logits have shape {shape}, but must be (B, 1, H, W) or (B, 1, D, H, W)")
    if logits.dtype not in _FLOATS:
        raise ValueError(f"{NAME}: logits are {logits.dtype}, but must be a float of 16 to 64 bits")
    if tuple(target.shape) != shape:
        raise ValueError(f"{NAME}: target has shape {tuple(target.shape)}, but the logits have {shape}")
    if target.device != logits.device:
        raise ValueError(f"{NAME}: target is on {target.device}, but the logits are on {logits.device}")
    if target.dtype not in (*_FLOATS, torch.bool, torch.uint8):
        raise ValueError(f"{NAME}: target is {target.dtype}, but must be bool, uint8 or a float of 16 to 64 bits")
    check_values(target)


def are_readable(target: Tensor) -> bool:
    """Return whether a target's values were checked; reading them elsewhere would wait or break a graph."""
    return target.device.type == "cpu" and not torch.compiler.is_compiling()


def check_values(target: Tensor) -> None:
    """Raise ValueError for values outside [0, 1] where they can be read."""
    if target.dtype == torch.bool or target.numel() == 0 or not are_readable(target):
        return
    low, high = (float(value) for value in target.aminmax())
    if not (low >= 0 and high <= 1):  # also refuses NaN
        raise ValueError(f"{NAME}: target ranges from {low:g} to {high:g}, but must stay in [0, 1]")
