"""A running mean of a network's weights: steadier than the weights of any single step.

Fine-tuning on a few dozen images jumps about its optimum, and a few validation images cannot tell which
jump was good. The mean of the weights along the way (Polyak and Juditsky 1992; with exponential weights
Tarvainen and Valpola 2017, arXiv:1703.01780) lies closer to it and costs one more copy of the weights.
"""

import copy

import torch
from torch import Tensor, nn


class RunningMean:
    """The exponential mean of a network's weights over the steps, as a network of its own.

    Args:
        network: the one that moves; its present weights are the initial mean.
        decay: share of the mean that a step keeps; with 0 `network` is the moving one itself.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network) if decay > 0 else network
        self._mean: list[Tensor] = [*self.network.parameters()]
        self._moving: list[Tensor] = [*network.parameters()]
        self._decay, self._count = decay, 0

    @torch.no_grad()
    def follow(self) -> None:
        """Take in the weights after a step.

        In step n the decay is at most (1 + n) / (10 + n), so that the initial weights are soon forgotten.
        """
        if self._decay == 0:
            return
        self._count += 1
        decay = min(self._decay, (1 + self._count) / (10 + self._count))
        torch._foreach_lerp_(self._mean, self._moving, 1 - decay)
