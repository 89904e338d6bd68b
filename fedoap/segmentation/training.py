"""One round of a site: gradient steps on its own images, on the personal and the shared path."""

from fractions import Fraction

from torch import Tensor

from fedoap.segmentation.descent import Descent, Metrics, Progress, Stretch, Workplace, descend
from fedoap.segmentation.evaluation import mean_dice
from fedoap.segmentation.modelfolder import Predictor, autocast
from fedoap.segmentation.network import Bank
from fedoap.segmentation.objectives import segmentation_loss
from fedoap.segmentation.optimizer import SiteOptimizer, round_rate
from fedoap.segmentation.sitemodel import SiteModel
from fedoap.segmentation.terms import begin_terms
from fedoap.strategies import shared_path_fraction, terms


def site_optimizer(model: SiteModel, place: Workplace) -> SiteOptimizer:
    """Return AdamW over the common, the shared and the personal parameters, as yet without moments."""
    return SiteOptimizer(model.shared_parameters() | model.personal_parameters(), place.plan.training)


def train_round(
    model: SiteModel, optimizer: SiteOptimizer, bank: Bank | None, number: int, place: Workplace
) -> Metrics:
    """Take the steps of round `number` (from 1) and return their number and mean `loss`.

    In every `validate_every`-th round and in the last, `dice_validation` after these steps is returned too.

    A fraction rho of the steps of a site's course, evenly spread, trains the shared path; the bank is
    constant. The strategy's terms amend the gradients.

    Raises:
        DataError: a case is wrong.
        TrainingError: the loss is no longer finite.
    """
    training, strategy = place.plan.training, place.plan.strategy
    first = (number - 1) * training.steps_per_round
    rho = shared_path_fraction(strategy, training.shared_path_fraction)
    network = place.parallel(model)

    def loss(image: Tensor, mask: Tensor, step: int) -> Tensor:
        path = "shared" if takes_shared_path(step, rho) else "personal"
        with autocast(place.device):
            logits = network(image, bank, path=path)
        return segmentation_loss(logits, mask)

    count = training.steps_per_round
    stretch = Stretch("train", first, count, lambda step: round_rate(training, number, step - first), 0, count)
    begun = begin_terms(terms(strategy), model, count)
    mean = descend(
        place, place.batches(first), stretch, Descent(loss, optimizer, lambda step: begun.amend(step - first))
    )
    begun.finish()
    if not place.leads:
        return {}
    metrics = {"loss": mean, "steps": float(count)}
    if number % training.validate_every == 0 or number == place.plan.rounds:
        dice = validation_dice(Predictor(place.plan, model, bank, place.device), place)
        place.report(Progress("train", count, count, mean, dice))
        metrics["dice_validation"] = dice
    return metrics


def validation_dice(predict: Predictor, place: Workplace) -> float:
    """Return the mean Dice on the validation cases, on the network's grid."""
    return mean_dice(predict, place.validation_cases())


def takes_shared_path(step: int, rho: float) -> bool:
    """Return whether step `step` (from 0) of a site's course is one of the fraction rho, evenly spread.

    Of the first n steps floor(n rho) are, with rho as an exact fraction, so that two runs agree.

    >>> [step for step in range(12) if takes_shared_path(step, 0.25)]
    [3, 7, 11]
    """
    exact = Fraction(rho).limit_denominator(10**6)
    return (step + 1) * exact // 1 > step * exact // 1


def fresh_model(place: Workplace) -> SiteModel:
    """Return the model with the initial weights that follow from the plan, on this process's device."""
    model = SiteModel(place.plan)
    return model.to(place.device)
