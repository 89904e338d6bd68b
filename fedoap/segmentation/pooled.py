"""All sites' images in one place: the bound that a federation is measured against. Only a study may do this.

As in a federated course are the initial weights, the number of gradient steps of all rounds and of the
calibration, the learning rate at each of them, and every site's batches in their order, each transformed as
at its own site. A step takes the next batch of every site and follows the mean of their gradients, so sites
count alike whatever their number of cases, and as many images are seen as in the federation. What differs:
there is one network and one optimizer instead of one per site, and no bank.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

from torch import Tensor

from fedoap.config import StrategyConfig
from fedoap.segmentation.calibration import calibrate
from fedoap.segmentation.descent import Descent, Metrics, Stretch, Workplace, descend
from fedoap.segmentation.modelfolder import autocast
from fedoap.segmentation.network import FedOAPNet
from fedoap.segmentation.objectives import segmentation_loss
from fedoap.segmentation.optimizer import SiteOptimizer, course_rate
from fedoap.segmentation.sitemodel import SiteModel


def train_pooled(places: Sequence[Workplace]) -> tuple[SiteModel, Metrics]:
    """Return a model, all of it shared, that was trained on the images of all sites, and its `loss` and `steps`.

    All places have the same plan and device, and one process each; progress is reported to the first.

    Raises:
        DataError: a case is wrong.
        TrainingError: the loss is no longer finite.
    """
    lead = places[0]
    assert all(place.plan == lead.plan and place.ranks == 1 for place in places)
    training, steps = lead.plan.training, lead.plan.rounds * lead.plan.training.steps_per_round
    model = SiteModel(lead.plan.model_copy(update={"strategy": StrategyConfig(name="pooled")})).to(lead.device)

    def loss(image: Tensor, mask: Tensor, step: int) -> Tensor:
        with autocast(lead.device):
            logits = model.shared(image)
        return segmentation_loss(logits, mask)

    descent = Descent(loss, SiteOptimizer(model.shared_parameters(), training), parts=len(places))
    stretch = Stretch("pooled", 0, steps, lambda step: course_rate(training, step), 0, steps)
    mean = descend(lead, _batch_of_each(places), stretch, descent)
    return model, {"loss": mean, "steps": float(steps)}


def tune_pooled(model: SiteModel, place: Workplace) -> tuple[FedOAPNet, Metrics]:
    """Return the pooled model after the calibration at one site, and how well both do there.

    Raises:
        DataError: a case is wrong.
        TrainingError: the loss is no longer finite.
    """
    return calibrate(model, None, place)


def _batch_of_each(places: Sequence[Workplace]) -> Iterator[tuple[Tensor, Tensor]]:
    return chain.from_iterable(zip(*(place.batches(0) for place in places), strict=True))
