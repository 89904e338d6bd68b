"""AdamW whose moments survive from round to round, and its learning rate as a closed form.

A site's moments belong to its personal state. They are kept by the parameters' names, so a round that
starts in a new process continues exactly where the last one stopped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fedoap.config import TrainingConfig
from fedoap.errors import TrainingError

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""Of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), as PyTorch has them."""
_FIELDS = ("exp_avg", "exp_avg_sq", "step")


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


def course_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of step `step` (from 0) of all rounds."""
    number, rest = divmod(step, config.steps_per_round)
    return round_rate(config, number + 1, rest)


def cosine_rate(rate: float, step: int, steps: int) -> float:
    """Return the learning rate of step `step` (from 0) of one cosine from `rate` towards 0.

    >>> [cosine_rate(1.0, step, 4) for step in (0, 2)]
    [1.0, 0.5]
    """
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


class SiteOptimizer:
    """AdamW over named parameters; a step does not move a parameter that has no gradient.

    PyTorch's function is called instead of its class: making a `torch.optim.Optimizer` imports the
    compiler, which takes as long as dozens of steps of a small network.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> None:
        self._parameters = dict(parameters)
        self._config = config
        self._moments: dict[str, _Moments] = {}

    def zero(self) -> None:
        """Forget all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Clip the gradient and move the parameters that have one."""
        if self._config.gradient_clip > 0:
            nn.utils.clip_grad_norm_(self._parameters.values(), self._config.gradient_clip)
        moved = [(name, p, p.grad) for name, p in self._parameters.items() if p.grad is not None]
        moments = [self._of(name, parameter) for name, parameter, _ in moved]
        adamw(
            [parameter for _, parameter, _ in moved],
            [gradient for _, _, gradient in moved],
            [each.exp_avg for each in moments],
            [each.exp_avg_sq for each in moments],
            [],
            [each.step for each in moments],
            fused=True,
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=rate,
            weight_decay=self._config.weight_decay,
            eps=EPSILON,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """Return the moments of every parameter that was ever moved, as `NAME.exp_avg` and so on, on the CPU."""
        return {
            f"{name}.{field}": getattr(moments, field).cpu().clone()
            for name, moments in self._moments.items()
            for field in _FIELDS
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over moments that `state` returned; parameters that it does not name start afresh.

        Raises:
            TrainingError: a moment has another shape than its parameter.
        """
        for name, parameter in self._parameters.items():
            found = [state[f"{name}.{field}"] for field in _FIELDS if f"{name}.{field}" in state]
            if len(found) < len(_FIELDS):
                continue
            if found[0].shape != parameter.shape:
                shapes = f"{tuple(found[0].shape)}, but the parameter's is {tuple(parameter.shape)}"
                raise TrainingError(f"kept moments of {name}: shape is {shapes}")
            self._moments[name] = _Moments(*(value.to(parameter.device, copy=True) for value in found))

    def _of(self, name: str, parameter: Tensor) -> "_Moments":
        if name not in self._moments:
            step = torch.zeros((), device=parameter.device)
            self._moments[name] = _Moments(torch.zeros_like(parameter), torch.zeros_like(parameter), step)
        return self._moments[name]


@dataclass(frozen=True, slots=True)
class _Moments:
    """Running means of the gradient and its square, and how many steps made them."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
