import pytest
import torch
from torch import nn

from fedoap.segmentation.averaging import RunningMean


def scalar(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    return move(layer, value)


def move(layer: nn.Linear, value: float) -> nn.Linear:
    with torch.no_grad():
        layer.weight.fill_(value)
    return layer


def test_the_mean_follows_with_a_decay_that_rises_to_its_value() -> None:
    """Planted bugs: the decay at its value from the first step; weights and mean exchanged."""
    network = scalar(0.0)
    mean = RunningMean(network, decay=0.2)

    seen = []
    for value in (11.0, 3.0):
        move(network, value)
        mean.follow()
        seen.append(next(mean.network.parameters()).item())

    # decays: 2/11 = 0.1818..., then min(0.2, 3/12) = 0.2
    assert seen == pytest.approx([9.0, 0.2 * 9.0 + 0.8 * 3.0])
    assert network.weight.item() == 3.0


def test_without_decay_the_mean_is_the_moving_network_itself() -> None:
    network = scalar(1.0)
    mean = RunningMean(network, decay=0.0)

    move(network, 5.0)
    mean.follow()

    assert mean.network is network
    assert network.weight.item() == 5.0
