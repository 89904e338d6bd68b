from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from easy_site import easy_place, easy_plan
from fedoap.config import CalibrationConfig, NetworkConfig, StrategyConfig
from fedoap.segmentation.calibration import calibrate, look_steps, train_alone
from fedoap.segmentation.descent import Progress, Workplace
from fedoap.segmentation.network import FedOAPNet
from fedoap.segmentation.sitemodel import SiteModel
from fedoap.segmentation.training import site_optimizer, train_round


def trained(place: Workplace) -> SiteModel:
    model = SiteModel(place.plan)
    train_round(model, site_optimizer(model, place), None, 1, place)
    return model


def equal(one: FedOAPNet, two: FedOAPNet) -> bool:
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def bias(network: FedOAPNet) -> float:
    return float(network.state_dict()["head.bias"])


def test_calibration_moves_a_copy_and_measures_both_paths(tmp_path: Path) -> None:
    """Planted bug: the personal network itself moved, and the shared weights with it."""
    useful = CalibrationConfig(steps=20, evaluations=2, learning_rate=1e-2)
    place = easy_place(tmp_path, easy_plan(steps=4, calibration=useful))
    model = trained(place)
    before = model.shared_state() | model.personal_state()

    network, metrics = calibrate(model, None, place)

    after = model.shared_state() | model.personal_state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert not equal(network, model.personal)
    assert set(metrics) == {
        "dice_validation_before", "dice_validation", "dice_test_before", "dice_test", "iou_test", "hd95_test",
        "nsd_test", "dice_test_shared", "steps",
    }  # fmt: skip
    assert metrics["dice_validation"] > metrics["dice_validation_before"]


def test_the_best_state_is_kept_even_when_it_is_the_first(tmp_path: Path) -> None:
    """Planted bugs: the last state kept; the state before that does not compete."""
    harmful = CalibrationConfig(steps=4, evaluations=3, learning_rate=50.0)
    place = easy_place(tmp_path, easy_plan(steps=30, calibration=harmful))
    model = trained(place)

    network, metrics = calibrate(model, None, place)

    assert equal(network, model.personal)
    assert metrics["dice_validation"] == metrics["dice_validation_before"]
    assert metrics["dice_test"] == pytest.approx(metrics["dice_test_before"], abs=1e-6)  # float32 beside float64


def test_no_steps_only_measure(tmp_path: Path) -> None:
    place = easy_place(tmp_path, easy_plan(steps=4, calibration=CalibrationConfig(steps=0)))
    model = trained(place)

    network, metrics = calibrate(model, None, place)

    assert equal(network, model.personal)
    assert metrics["steps"] == 0
    assert metrics["dice_test"] == pytest.approx(metrics["dice_test_before"], abs=1e-6)  # float32 beside float64


def test_the_same_calibration_gives_the_same_bits(tmp_path: Path) -> None:
    """Planted bug: noise of a fresh seed each time."""
    settings = CalibrationConfig(steps=20, evaluations=2, learning_rate=1e-2, sigma=2.0, lam=0.5, region="band")
    place = easy_place(tmp_path, easy_plan(steps=4, calibration=settings))
    model = trained(place)

    one, two = (calibrate(model, None, place)[0] for _ in range(2))

    assert equal(one, two)
    assert not equal(one, model.personal)


def test_calibration_takes_the_loss_that_the_plan_names(tmp_path: Path) -> None:
    """Planted bug: the perturbed boundary loss whatever the name."""
    place = easy_place(tmp_path, easy_plan(steps=4))
    model = trained(place)

    def calibrated(**settings: object) -> FedOAPNet:
        config = CalibrationConfig.model_validate(
            {"steps": 20, "evaluations": 2, "learning_rate": 1e-2, "sigma": 2.0, "distance_weight": 0.5, **settings}
        )
        plan = place.plan.model_copy(update={"calibration": config})
        return calibrate(model, None, replace(place, plan=plan))[0]

    pbl, plain, hausdorff, boundary = (calibrated(loss=name) for name in ("pbl", "plain", "hausdorff_dt", "boundary"))

    assert not any(equal(one, two) for one, two in combinations((model.personal, pbl, plain, hausdorff, boundary), 2))
    assert equal(plain, calibrated(loss="pbl", lam=0.0))


def test_validation_is_looked_at_as_often_as_configured(tmp_path: Path) -> None:
    seen: list[Progress] = []
    settings = CalibrationConfig(steps=6, evaluations=4)
    place = easy_place(tmp_path, easy_plan(rounds=1, steps=4, calibration=settings), seen.append)

    train_alone(place)
    alone = [each.step for each in seen if each.dice >= 0]
    seen.clear()
    calibrate(SiteModel(place.plan), None, place)

    assert alone == [4, 6, 8, 10]
    assert [each.step for each in seen if each.dice >= 0] == [0, 2, 4, 6]
    assert {each.steps for each in seen} == {6}


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 200])
@pytest.mark.parametrize("evaluations", [1, 2, 5, 50])
def test_looks_run_from_the_start_to_the_end(steps: int, evaluations: int) -> None:
    looks = look_steps(steps, evaluations)

    assert (looks[0], looks[-1]) == (0, steps)
    assert len(looks) == min(max(2, evaluations), steps + 1)


def test_training_alone_learns_an_easy_problem_in_the_steps_of_a_federated_course(tmp_path: Path) -> None:
    plan = easy_plan(rounds=2, steps=40, calibration=CalibrationConfig(steps=10, evaluations=2))
    place = easy_place(tmp_path, plan)

    _, metrics = train_alone(place)

    assert set(metrics) == {
        "loss", "dice_validation", "dice_test", "iou_test", "hd95_test", "nsd_test", "steps",
    }  # fmt: skip
    assert metrics["steps"] == 90
    assert metrics["dice_test"] > 0.8


def test_training_alone_starts_from_the_weights_that_the_federation_starts_from(tmp_path: Path) -> None:
    """Planted bug: the comparison's network built from another seed."""
    plan = easy_plan(rounds=1, calibration=CalibrationConfig(steps=0))
    still = plan.model_copy(update={"training": plan.training.model_copy(update={"learning_rate": 1e-30})})
    place = easy_place(tmp_path, still)

    network, _ = train_alone(place)

    federated = SiteModel(plan).shared_state()
    for name, value in network.named_parameters():
        twin = name if name in federated else name.replace("bottleneck_q", "bottleneck_kv")
        assert np.allclose(value.detach().numpy(), federated[twin], atol=1e-12), name


def test_calibration_keeps_the_mean_of_the_weights_where_told_to(tmp_path: Path) -> None:
    """Planted bugs: the moving weights kept; the mean never told of a step."""
    settings = CalibrationConfig(steps=2, evaluations=2, learning_rate=1e-2)
    place = easy_place(tmp_path, easy_plan(steps=30, calibration=settings))
    model = trained(place)
    averaged = settings.model_copy(update={"average": 0.9})

    start = bias(model.personal)
    last = bias(calibrate(model, None, place)[0])
    plan = place.plan.model_copy(update={"calibration": averaged})
    mean = bias(calibrate(model, None, replace(place, plan=plan))[0])

    # the mean lags behind the weights, which move one way in so few steps
    assert 0 < abs(mean - start) < abs(last - start)


def test_feddp_is_calibrated_by_its_own_loss(tmp_path: Path) -> None:
    """Noise changes nothing, the weight of the disagreement does. Planted bug: the perturbed boundary loss anyway."""

    def last_loss(lam: float, sigma: float) -> float:
        seen: list[Progress] = []
        tuning = CalibrationConfig(steps=3, evaluations=2, lam=lam, sigma=sigma, tau=0.01)
        network = NetworkConfig(width=4, depth=1, attention="projection")
        plan = easy_plan(steps=3, network=network, calibration=tuning, strategy=StrategyConfig(name="feddp"))
        place = easy_place(tmp_path, plan, seen.append)
        calibrate(trained(place), None, place)
        return seen[-1].loss

    assert last_loss(0.5, 0.1) == last_loss(0.5, 9.0)
    assert last_loss(0.5, 0.1) != last_loss(0.0, 0.1)
