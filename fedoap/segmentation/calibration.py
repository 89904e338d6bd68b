"""After the rounds: the site's own network is fine-tuned on its own images, and all networks are measured.

`calibrate` ends a federated course, with the perturbed boundary loss or another one. `train_alone` is what that
course is compared with, under the same budget.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedoap.config import Plan, StrategyConfig
from fedoap.segmentation.averaging import RunningMean
from fedoap.segmentation.boundaries import calibration_loss
from fedoap.segmentation.data import prepared_cases
from fedoap.segmentation.descent import Batches, Descent, Loss, Metrics, Progress, Stretch, Workplace, descend
from fedoap.segmentation.evaluation import evaluate, mean_dice
from fedoap.segmentation.modelfolder import Predictor, autocast
from fedoap.segmentation.network import Bank, FedOAPNet
from fedoap.segmentation.objectives import inconsistency_loss, segmentation_loss
from fedoap.segmentation.optimizer import SiteOptimizer, cosine_rate, course_rate
from fedoap.segmentation.sitemodel import SiteModel
from fedoap.strategies import Inconsistency, terms


def calibrate(model: SiteModel, bank: Bank | None, place: Workplace) -> tuple[FedOAPNet, Metrics]:
    """Return the site's calibrated network, all of it its own, and how well it and the shared one do.

    A copy of the personal network takes `calibration.steps` steps on `calibration.loss`, or on the strategy's own
    loss, the learning rate falling along one cosine. The model itself stays as it is.

    Raises:
        DataError: a case is wrong.
        TrainingError: the loss is no longer finite.
    """
    network = model.own_network()
    metrics = {
        "dice_test_before": _test_dice(network, bank, place),
        "dice_test_shared": _test_dice(model.shared, bank, place),
        "steps": float(place.plan.calibration.steps),
    }
    first, steps = _round_steps(place), place.plan.calibration.steps
    guided = any(isinstance(term, Inconsistency) for term in terms(place.plan.strategy))
    tuned = place.parallel(network)
    loss = _guided_loss(tuned, model, bank, place) if guided else _calibration_loss(tuned, bank, place)
    stretch = Stretch("calibrate", first, steps, _calibration_rate(place), 0, steps)
    looks = _fine_tune(Predictor(place.plan, network, bank, place.device), loss, place, place.batches(first), stretch)
    dice = {"dice_validation_before": looks[0], "dice_validation": max(looks)}
    return network, metrics | dice | _test(network, bank, place)


def train_alone(place: Workplace) -> tuple[FedOAPNet, Metrics]:
    """Return a network that was trained on this site's images only, and how well it does.

    As in a federated course are the initial weights, the network (its attention sees the image's own tokens),
    the batches and their order, the number of steps of all rounds and of the calibration, the learning rate at
    each of them, and when the validation cases choose a state. What differs: there is no bank and no shared
    path, and the loss is the plain one throughout.

    Raises:
        DataError: a case is wrong.
        TrainingError: the loss is no longer finite.
    """
    training, steps, more = place.plan.training, _round_steps(place), place.plan.calibration.steps
    network = SiteModel(alone_plan(place.plan)).personal.to(place.device)
    loss, batches = _plain_loss(place.parallel(network), place), place.batches(0)

    optimizer = SiteOptimizer(dict(network.named_parameters()), training)
    rounds = Stretch("local", 0, steps, lambda step: course_rate(training, step), 0, steps + more)
    mean = descend(place, batches, rounds, Descent(loss, optimizer))
    stretch = Stretch("local", steps, more, _calibration_rate(place), steps, steps + more)
    looks = _fine_tune(Predictor(place.plan, network, None, place.device), loss, place, batches, stretch)
    return network, {
        "loss": mean,
        "dice_validation": max(looks),
        "steps": float(steps + more),
        **_test(network, None, place),
    }


def alone_plan(plan: Plan) -> Plan:
    """Return the plan whose network a site trains alone: nothing of it is shared."""
    return plan.model_copy(update={"strategy": StrategyConfig(name="local")})


def tune_new_site(model: SiteModel, bank: Bank | None, place: Workplace, epochs: int) -> tuple[FedOAPNet, Metrics]:
    """Return the network of a site that joins after the last round, fine-tuned for some epochs on its images.

    Its personal parts start as copies of the shared ones. All of it is trained on the plain loss, the learning
    rate falling along one cosine from the calibration's; the state with the best validation Dice is kept.

    Raises:
        DataError: a case is wrong.
        TrainingError: the loss is no longer finite.
    """
    model.reset_personal()
    network = model.own_network()
    config, steps = place.plan.calibration, math.ceil(epochs * len(place.training) / place.plan.training.batch_size)
    loss = _plain_loss(place.parallel(network), place, bank)
    stretch = Stretch("tune", 0, steps, lambda step: cosine_rate(config.learning_rate, step, steps), 0, steps)
    looks = _fine_tune(Predictor(place.plan, network, bank, place.device), loss, place, place.batches(0), stretch)
    return network, {"dice_validation_before": looks[0], "dice_validation": max(looks), "steps": float(steps)}


def look_steps(steps: int, evaluations: int) -> list[int]:
    """Return after how many steps the validation cases are evaluated: before the first, after the last, and between.

    If there are steps at all, there are at least two evaluations.

    >>> look_steps(200, 5), look_steps(200, 1), look_steps(0, 5)
    ([0, 50, 100, 150, 200], [0, 200], [0])
    """
    intervals = max(1, evaluations - 1)
    return sorted({steps * index // intervals for index in range(intervals + 1)})


def _fine_tune(predict: Predictor, loss: Loss, place: Workplace, batches: Batches, stretch: Stretch) -> list[float]:
    """Leave the best of the evaluated states in the network and return the validation Dice of each.

    With `calibration.average` the states are those of the running mean of the weights. Of equal states the
    earliest wins. Only the leading process evaluates; the networks of the others are of no further use.
    """
    network = predict.network
    average = RunningMean(network, place.plan.calibration.average)
    watched = replace(predict, network=average.network)
    descent = Descent(loss, SiteOptimizer(dict(network.named_parameters()), place.plan.training), settle=average.follow)
    cases = place.validation_cases()
    marks = look_steps(stretch.count, place.plan.calibration.evaluations)
    looks: list[float] = []
    best: dict[str, Tensor] = {}
    mean = 0.0
    for start, stop in pairwise([0, *marks]):
        if stop > start:
            piece = replace(stretch, first=stretch.first + start, count=stop - start, done=stretch.done + start)
            mean = descend(place, batches, piece, descent)
        looks.append(mean_dice(watched, cases) if place.leads else -1.0)
        if place.leads:
            place.report(Progress(stretch.stage, stretch.done + stop, stretch.steps, mean, looks[-1]))
        if looks[-1] > max(looks[:-1], default=-math.inf):
            best = {name: value.detach().clone() for name, value in average.network.state_dict().items()}
    network.load_state_dict(best)
    return looks


def _plain_loss(network: nn.Module, place: Workplace, bank: Bank | None = None) -> Loss:
    def loss(image: Tensor, mask: Tensor, step: int) -> Tensor:
        with autocast(place.device):
            logits = network(image, bank)
        return segmentation_loss(logits, mask)

    return loss


def _calibration_loss(network: nn.Module, bank: Bank | None, place: Workplace) -> Loss:
    def loss(image: Tensor, mask: Tensor, step: int) -> Tensor:
        with autocast(place.device):
            logits = network(image, bank)
        seed = place.seed(f"noise of rank {place.rank}", step)
        return calibration_loss(logits, mask, place.plan.calibration, seed)

    return loss


def _guided_loss(network: nn.Module, model: SiteModel, bank: Bank | None, place: Workplace) -> Loss:
    """Return the loss that counts voxels most where the site's network, as it was before, and the shared one differ."""

    def loss(image: Tensor, mask: Tensor, step: int) -> Tensor:
        with autocast(place.device):
            with torch.no_grad():
                others = [model(image, bank, path="personal"), model(image, bank, path="shared")]
            logits = network(image, bank)
        return inconsistency_loss(logits, mask, others, place.plan.calibration.lam)

    return loss


def _test(network: FedOAPNet, bank: Bank | None, place: Workplace) -> Metrics:
    """Return the measures on the test cases, on the files' grids; -1 in all but the leading process."""
    if not place.leads:
        return dict.fromkeys(("dice_test", "iou_test", "hd95_test", "nsd_test"), -1.0)
    cases = prepared_cases(place.test, place.data, place.plan, place.cache)
    mean = evaluate(Predictor(place.plan, network, bank, place.device), cases).mean
    return {"dice_test": mean.dice, "iou_test": mean.iou, "hd95_test": mean.hd95, "nsd_test": mean.nsd}


def _test_dice(network: FedOAPNet, bank: Bank | None, place: Workplace) -> float:
    """Return the mean Dice on the test cases, on the files' grids; -1 in all but the leading process."""
    if not place.leads:
        return -1.0
    cases = prepared_cases(place.test, place.data, place.plan, place.cache)
    return mean_dice(Predictor(place.plan, network, bank, place.device), cases, grid="file")


def _calibration_rate(place: Workplace) -> Callable[[int], float]:
    config, first = place.plan.calibration, _round_steps(place)
    return lambda step: cosine_rate(config.learning_rate, step - first, config.steps)


def _round_steps(place: Workplace) -> int:
    return place.plan.rounds * place.plan.training.steps_per_round
