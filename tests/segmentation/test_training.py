from pathlib import Path

import numpy as np
import pytest
import torch

from easy_site import easy_place, easy_plan
from fedoap.config import StrategyConfig, TrainingConfig
from fedoap.errors import TrainingError
from fedoap.segmentation.descent import Metrics, Progress, Workplace
from fedoap.segmentation.network import Bank
from fedoap.segmentation.optimizer import SiteOptimizer
from fedoap.segmentation.sitemodel import SiteModel, State
from fedoap.segmentation.training import site_optimizer, takes_shared_path, train_round
from fedoap.strategies import STRATEGIES


def training(steps: int = 12, rho: float = 0.25, rate: float = 5e-3, clip: float = 1.0) -> TrainingConfig:
    return TrainingConfig(
        steps_per_round=steps, batch_size=4, learning_rate=rate, shared_path_fraction=rho, gradient_clip=clip
    )


def bank() -> Bank:
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 2, 4, 8, generator=generator)
    return Bank(keys, values, torch.zeros(4))


def rounds(place: Workplace, count: int = 1) -> tuple[SiteModel, SiteOptimizer, Metrics]:
    """Train without interruption and without anyone else."""
    model = SiteModel(place.plan)
    optimizer = site_optimizer(model, place)
    for number in range(1, count + 1):
        metrics = train_round(model, optimizer, bank(), number, place)
    return model, optimizer, metrics


def weights(model: SiteModel) -> State:
    return model.shared_state() | model.personal_state()


def equal(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_an_easy_problem_is_learned(tmp_path: Path) -> None:
    """Planted bug: masks shuffled against images."""
    seen: list[Progress] = []
    place = easy_place(tmp_path, easy_plan(training=training(steps=30, rho=0.2, rate=1e-2)), seen.append)

    _, _, metrics = rounds(place, 2)

    assert metrics["loss"] < 0.65 * seen[0].loss
    assert metrics["dice_validation"] > 0.8


def test_validation_cases_are_looked_at_every_so_many_rounds_and_after_the_last(tmp_path: Path) -> None:
    """Planted bugs: rounds counted from 0; the last one left out."""
    settings = training(steps=1).model_copy(update={"validate_every": 2})
    place = easy_place(tmp_path, easy_plan(training=settings, rounds=5))
    model = SiteModel(place.plan)
    optimizer = site_optimizer(model, place)

    looks = [train_round(model, optimizer, None, number, place).get("dice_validation") for number in range(1, 6)]

    assert [look is not None for look in looks] == [False, True, False, True, True]


def test_the_same_round_gives_the_same_bits(tmp_path: Path) -> None:
    """Planted bug: batches drawn from a generator seeded by the clock."""
    place = easy_place(tmp_path, easy_plan())

    one, two = (rounds(place)[0] for _ in range(2))

    assert equal(weights(one), weights(two))


def test_another_site_and_another_seed_see_other_batches(tmp_path: Path) -> None:
    place = easy_place(tmp_path, easy_plan())
    other = easy_place(tmp_path, easy_plan(), site="b")

    assert not equal(weights(rounds(place)[0]), weights(rounds(other)[0]))


def test_a_round_in_a_new_process_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    """Planted bug: moments that start afresh."""
    place = easy_place(tmp_path, easy_plan())
    whole, _, _ = rounds(place, 2)
    first, kept, _ = rounds(place, 1)

    again = SiteModel(place.plan)
    again.load_shared(first.shared_state())
    again.load_personal(first.personal_state())
    optimizer = site_optimizer(again, place)
    optimizer.load(kept.state())
    train_round(again, optimizer, bank(), 2, place)

    assert equal(weights(whole), weights(again))


def test_each_round_sees_further_batches(tmp_path: Path) -> None:
    """The rate is that of round 1 again. Planted bug: batches that start again at step 0."""
    same_rate = training().model_copy(update={"restart_rounds": 1, "restart_factor": 1})
    place = easy_place(tmp_path, easy_plan(training=same_rate))
    models = [SiteModel(place.plan) for _ in range(2)]

    for number, model in enumerate(models, 1):
        train_round(model, site_optimizer(model, place), None, number, place)

    assert not equal(weights(models[0]), weights(models[1]))


def test_each_round_has_its_own_part_of_the_schedule(tmp_path: Path) -> None:
    """AdamW's first step is as long as the rate, here half of it. Planted bug: a schedule that starts again."""
    one_step = training(steps=1, rho=0.0, rate=1e-2).model_copy(update={"restart_rounds": 2, "weight_decay": 0.0})
    place = easy_place(tmp_path, easy_plan(training=one_step))
    model = SiteModel(place.plan)

    train_round(model, site_optimizer(model, place), None, 2, place)

    before = SiteModel(place.plan).shared_state()["encoder.0.norm1.bias"]
    assert np.abs(model.shared_state()["encoder.0.norm1.bias"] - before).max() == pytest.approx(5e-3, rel=1e-3)


def test_a_round_has_its_steps_and_each_path_its_share(tmp_path: Path) -> None:
    """Planted bugs: one step too many; zero gradients, by which a path moves the other path's parameters."""
    seen: list[Progress] = []
    place = easy_place(tmp_path, easy_plan(training=training(steps=12, rho=0.25)), seen.append)

    _, optimizer, metrics = rounds(place)

    moves = {name: int(value) for name, value in optimizer.state().items() if name.endswith(".step")}
    assert metrics["steps"] == 12
    assert (seen[-1].step, seen[-1].steps, seen[-1].dice) == (12, 12, metrics["dice_validation"])
    assert moves["encoder.0.conv1.weight.step"] == 12
    assert moves["head.weight.step"] == 3
    assert moves["personal.head.weight.step"] == 9


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.2, 0.3, 1 / 3, 0.5, 0.75, 1.0])
def test_steps_on_the_shared_path_are_spread_evenly(rho: float) -> None:
    taken = np.cumsum([takes_shared_path(step, rho) for step in range(1000)])

    assert np.abs(taken - rho * np.arange(1, 1001)).max() < 1


def test_a_step_on_the_shared_path_leaves_personal_parameters_alone(tmp_path: Path) -> None:
    place = easy_place(tmp_path, easy_plan(training=training(rho=1.0)))

    model, _, _ = rounds(place)

    assert equal(model.personal_state(), SiteModel(place.plan).personal_state())


def test_a_step_on_the_personal_path_leaves_shared_twins_alone(tmp_path: Path) -> None:
    place = easy_place(tmp_path, easy_plan(training=training(rho=0.0)))

    model, _, _ = rounds(place)

    before, after = SiteModel(place.plan).shared_state(), model.shared_state()
    assert np.array_equal(before["head.weight"], after["head.weight"])
    assert not np.array_equal(before["encoder.0.conv1.weight"], after["encoder.0.conv1.weight"])


def test_the_pull_holds_personal_parts_near_the_twins_that_the_round_began_with(tmp_path: Path) -> None:
    """They start half way between 0 and their twins. Planted bug: a pull to 0."""

    def distance(mu: float) -> float:
        plan = easy_plan(training=training(rho=0.0, rate=2e-3), strategy=StrategyConfig(proximal=mu))
        place = easy_place(tmp_path, plan)
        model = SiteModel(plan)
        state = {name: value / 2 for name, value in model.personal_state().items()}
        model.load_personal(state)
        train_round(model, site_optimizer(model, place), None, 1, place)
        return sum(float(((own - twin) ** 2).sum().detach()) for _, own, twin in model.twins())

    assert distance(100.0) < 0.97 * distance(0.0)


def test_the_bank_is_read_and_stays_as_it_is(tmp_path: Path) -> None:
    place = easy_place(tmp_path, easy_plan())
    read = bank()

    with_bank, without = SiteModel(place.plan), SiteModel(place.plan)
    train_round(with_bank, site_optimizer(with_bank, place), read, 1, place)
    train_round(without, site_optimizer(without, place), None, 1, place)

    assert not equal(weights(with_bank), weights(without))
    assert torch.equal(read.keys, bank().keys)
    assert torch.equal(read.values, bank().values)


def test_every_strategy_and_kind_of_attention_trains(tmp_path: Path) -> None:
    for strategy in STRATEGIES:
        for attention in ("off", "projection", "joint", "gated")[strategy == "feddp" :]:
            network = easy_plan().network.model_copy(update={"attention": attention})
            name = StrategyConfig(name=strategy)
            place = easy_place(tmp_path, easy_plan(network=network, strategy=name, training=training(steps=2)))
            model = SiteModel(place.plan)
            known = bank() if network.has_bank else None

            metrics = train_round(model, site_optimizer(model, place), known, 1, place)

            assert np.isfinite(metrics["loss"]), (strategy, attention)


def test_a_loss_that_is_not_finite_ends_the_round(tmp_path: Path) -> None:
    """Planted bugs: the loss looked at only in the last step of all rounds; NaN averaged away."""
    place = easy_place(tmp_path, easy_plan(training=training(steps=10, rate=1e25, clip=0.0)))

    with pytest.raises(TrainingError, match=r"site a: loss is (nan|inf) by step 10 of train"):
        rounds(place)


def test_more_processes_than_items_in_a_batch_are_refused(tmp_path: Path) -> None:
    place = easy_place(tmp_path, easy_plan())

    with pytest.raises(TrainingError, match=r"worker\.gpus is 5, but training\.batch_size is 4"):
        place.shared_out(0, 5)
