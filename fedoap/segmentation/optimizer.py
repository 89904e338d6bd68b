"""AdamW whose moments survive from round to round, and its learning rate as a closed form.

A site's moments belong to its personal state: they are kept by the parameters' names, so that a
round that starts in a new process goes on exactly where the last one stopped.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedoap.config import TrainingConfig
from fedoap.errors import TrainingError

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def round_rate(config: TrainingConfig, number: int, step: int) -> float:
    """Return the learning rate of step `step` (from 0) of round `number` (from 1).

    Cosine annealing with warm restarts (Loshchilov and Hutter 2017, eq. 5, arXiv:1608.03983) to 0, its
    periods T0, T0 Tmult, T0 Tmult^2 ... in rounds. It counts in whole steps, so a restart falls on the
    first step of its round to the last bit.
    """
    position = (number - 1) * config.steps_per_round + step
    period = config.restart_rounds * config.steps_per_round
    while position >= period:
        position -= period
        period *= config.restart_factor
    return cosine_rate(config.learning_rate, position, period)


def cosine_rate(rate: float, step: int, steps: int) -> float:
    """Return the learning rate of step `step` (from 0) of one cosine from `rate` towards 0.

    >>> [cosine_rate(1.0, step, 4) for step in (0, 2)]
    [1.0, 0.5]
    """
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


class SiteOptimizer:
    """AdamW over named parameters; a parameter without gradient in a step is left alone by it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> None:
        self._parameters = dict(parameters)
        self._clip = config.gradient_clip
        self._adamw = torch.optim.AdamW(
            self._parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )

    def zero(self) -> None:
        """Forget all gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def step(self, rate: float) -> None:
        """Clip the gradient and move the parameters that have one."""
        if self._clip > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._clip)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()

    def state(self) -> dict[str, Tensor]:
        """Return the moments of every parameter that was ever moved, as `NAME.exp_avg` and so on, on the CPU."""
        return {
            f"{name}.{moment}": self._adamw.state[parameter][moment].detach().cpu().clone()
            for name, parameter in self._parameters.items()
            if parameter in self._adamw.state
            for moment in _MOMENTS
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over moments that `state` returned; parameters that it does not name start afresh.

        Raises:
            TrainingError: a moment has another shape than its parameter.
        """
        for name, parameter in self._parameters.items():
            found = {moment: state[f"{name}.{moment}"] for moment in _MOMENTS if f"{name}.{moment}" in state}
            if len(found) < len(_MOMENTS):
                continue
            if found["exp_avg"].shape != parameter.shape:
                shapes = f"{tuple(found['exp_avg'].shape)}, but the parameter's is {tuple(parameter.shape)}"
                raise TrainingError(f"kept moments of {name}: shape is {shapes}")
            self._adamw.state[parameter] = {
                moment: value.to(parameter.device, copy=True) for moment, value in found.items()
            }
