from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from easy_site import easy_place, easy_plan
from fedoap.config import TrainingConfig
from fedoap.errors import TrainingError
from fedoap.segmentation.descent import Descent, Progress, Stretch, descend
from fedoap.segmentation.optimizer import SiteOptimizer


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Batch k holds the number k."""
    step = 0
    while True:
        yield torch.full((4, 1, 1, 1), float(step)), torch.zeros(4, 1, 1, 1)
        step += 1


def test_each_step_sees_one_batch_its_number_and_the_gradient_of_that_step_alone(tmp_path: Path) -> None:
    """Planted bug: gradients that add up over steps, so that the last is 0 + 1 + 2 instead of 2."""
    w = nn.Parameter(torch.ones(1))
    optimizer = SiteOptimizer({"w": w}, TrainingConfig(gradient_clip=0.0))
    seen = []

    def loss(image: Tensor, mask: Tensor, step: int) -> Tensor:
        seen.append((float(image.mean()), step))
        return image.mean() * w.sum()

    place = easy_place(tmp_path, easy_plan())
    descend(place, batches(), Stretch("train", 7, 3, lambda _: 1e-9, 0, 3), Descent(loss, optimizer))

    assert seen == [(0.0, 7), (1.0, 8), (2.0, 9)]
    assert w.grad is not None
    assert w.grad.tolist() == [2.0]


def test_the_mean_of_the_losses_is_returned_and_reported(tmp_path: Path) -> None:
    seen: list[Progress] = []
    w = nn.Parameter(torch.ones(1))
    optimizer = SiteOptimizer({"w": w}, TrainingConfig())
    place = easy_place(tmp_path, easy_plan(), seen.append)

    def loss(image: Tensor, mask: Tensor, step: int) -> Tensor:
        return image.mean() + 0 * w.sum()

    mean = descend(place, batches(), Stretch("train", 0, 12, lambda _: 0.0, 30, 50), Descent(loss, optimizer))

    assert mean == 5.5
    assert seen == [Progress("train", 40, 50, 4.5), Progress("train", 42, 50, 5.5)]


def test_a_loss_that_is_not_finite_stops_at_the_next_look(tmp_path: Path) -> None:
    """Planted bugs: NaN averaged away; looked for only at the end."""
    w = nn.Parameter(torch.ones(1))
    optimizer = SiteOptimizer({"w": w}, TrainingConfig())
    steps = []

    def loss(image: Tensor, mask: Tensor, step: int) -> Tensor:
        steps.append(step)
        return (w / (3 - step if step == 3 else 1)).sum()

    place = easy_place(tmp_path, easy_plan())
    with pytest.raises(TrainingError, match=r"site a: loss is (nan|inf) by step 10 of train"):
        descend(place, batches(), Stretch("train", 0, 100, lambda _: 0.0, 0, 100), Descent(loss, optimizer))
    assert len(steps) == 10


def test_seeds_differ_by_site_purpose_and_step(tmp_path: Path) -> None:
    """Planted bugs: each of the three left out of the seed."""
    a, b = easy_place(tmp_path, easy_plan()), easy_place(tmp_path, easy_plan(), site="b")

    seeds = {a.seed("x"), a.seed("x", 1), a.seed("y"), b.seed("x")}

    assert len(seeds) == 4
    assert a.seed("x", 1) == easy_place(tmp_path, easy_plan()).seed("x", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)
