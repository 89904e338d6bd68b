import math

import pytest
import torch
from torch import Tensor, nn

from fedoap.config import TrainingConfig
from fedoap.errors import TrainingError
from fedoap.segmentation.optimizer import SiteOptimizer, cosine_rate, round_rate

CONFIG = TrainingConfig(steps_per_round=4, learning_rate=2.0, restart_rounds=2, restart_factor=2, weight_decay=0.1)


@pytest.mark.parametrize(
    ("number", "step", "rate"),
    [
        (1, 0, 2.0),  # first period: rounds 1 and 2, 8 steps
        (1, 2, 1 + math.cos(math.pi / 4)),
        (2, 0, 1.0),
        (2, 3, 1 + math.cos(math.pi * 7 / 8)),
        (3, 0, 2.0),  # second: rounds 3 to 6, 16 steps
        (5, 0, 1.0),
        (6, 3, 1 + math.cos(math.pi * 15 / 16)),
        (7, 0, 2.0),  # third: 32 steps
        (11, 0, 1.0),
    ],
)
def test_the_rate_falls_as_a_cosine_and_restarts_after_2_4_and_8_rounds(number: int, step: int, rate: float) -> None:
    assert round_rate(CONFIG, number, step) == pytest.approx(rate, abs=1e-12)


def test_the_rate_is_that_of_torch() -> None:
    config = TrainingConfig(steps_per_round=1, learning_rate=0.5, restart_rounds=3, restart_factor=3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3, T_mult=3)
    theirs = []

    for _ in range(40):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()

    assert [round_rate(config, number, 0) for number in range(1, 41)] == pytest.approx(theirs, abs=1e-12)


def test_a_factor_of_one_repeats_the_same_period() -> None:
    config = TrainingConfig(steps_per_round=2, learning_rate=1.0, restart_rounds=2, restart_factor=1)

    assert [round_rate(config, number, 0) for number in range(1, 6)] == pytest.approx([1.0, 0.5, 1.0, 0.5, 1.0])


def test_one_cosine_ends_near_zero() -> None:
    assert cosine_rate(3.0, 99, 100) == pytest.approx(3.0 * math.pi**2 / 4e4, rel=1e-3)


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return {name: nn.Parameter(torch.randn(3, generator=generator)) for name in ("a", "b", "c")}


def step(optimizer: SiteOptimizer, values: dict[str, nn.Parameter], only: str = "abc") -> None:
    optimizer.zero()
    sum(((values[name] - 1) ** 2).sum() for name in only).backward()  # type: ignore[union-attr]
    optimizer.step(0.1)


def test_moments_that_were_kept_go_on_where_they_stopped() -> None:
    """Planted bugs: the step count, the first and the second moment not kept."""
    whole, first = parameters(), parameters()
    one, two = SiteOptimizer(whole, CONFIG), SiteOptimizer(first, CONFIG)
    for optimizer, values in ((one, whole), (two, first)):
        step(optimizer, values)
        step(optimizer, values, only="a")

    again = SiteOptimizer(first, CONFIG)
    again.load(two.state())
    step(one, whole)
    step(again, first)

    assert all(torch.equal(whole[name], first[name]) for name in whole)


def test_the_steps_are_those_of_torch() -> None:
    values, theirs = parameters(), parameters()
    config = CONFIG.model_copy(update={"gradient_clip": 0.0})
    ours = SiteOptimizer(values, config)
    adamw = torch.optim.AdamW(theirs.values(), lr=0.1, weight_decay=0.1)

    for _ in range(5):
        step(ours, values)
        adamw.zero_grad()
        sum(((value - 1) ** 2).sum() for value in theirs.values()).backward()  # type: ignore[union-attr]
        adamw.step()

    for name, value in theirs.items():
        torch.testing.assert_close(values[name], value)


def test_a_parameter_without_gradient_stays_without_moments() -> None:
    values = parameters()
    before = values["b"].detach().clone()
    optimizer = SiteOptimizer(values, CONFIG)

    step(optimizer, values, only="ac")

    assert {name.split(".")[0] for name in optimizer.state()} == {"a", "c"}
    assert torch.equal(values["b"].detach(), before)


def test_the_gradient_is_clipped_to_its_largest_norm() -> None:
    values = parameters()
    optimizer = SiteOptimizer(values, TrainingConfig(gradient_clip=0.5))
    for name, gradient in {"a": [3.0, 0.0, 0.0], "b": [0.0, 4.0, 0.0], "c": [0.0, 0.0, 0.0]}.items():
        values[name].grad = torch.tensor(gradient)

    optimizer.step(0.1)

    gradients: list[Tensor] = [value.grad for value in values.values() if value.grad is not None]
    assert torch.linalg.vector_norm(torch.stack(gradients)).item() == pytest.approx(0.5, rel=1e-4)


def test_moments_of_another_network_are_refused() -> None:
    optimizer = SiteOptimizer(parameters(), CONFIG)
    state = {f"a.{moment}": torch.zeros(7) for moment in ("exp_avg", "exp_avg_sq", "step")}

    with pytest.raises(TrainingError, match=r"kept moments of a: shape is \(7,\), but the parameter's is \(3,\)"):
        optimizer.load(state)
