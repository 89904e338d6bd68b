"""Training on all sites' images: what is equal to a federated course, and whose images count."""

from pathlib import Path

import numpy as np
import torch

from easy_site import easy_place, easy_plan, write_easy_site
from fedoap.config import CalibrationConfig, NetworkConfig, StrategyConfig
from fedoap.segmentation.descent import Descent, Progress, Stretch, Workplace, descend
from fedoap.segmentation.optimizer import SiteOptimizer
from fedoap.segmentation.pooled import train_pooled, tune_pooled
from fedoap.segmentation.sitemodel import SiteModel
from fedoap.segmentation.training import site_optimizer, train_round

PLAN = easy_plan(
    steps=4,
    network=NetworkConfig(width=4, depth=1, attention="projection"),
    calibration=CalibrationConfig(steps=16, evaluations=2, learning_rate=2e-2),
    strategy=StrategyConfig(name="fedavg"),
)


def of(model: SiteModel) -> np.ndarray:
    return np.concatenate([value.ravel() for value in model.shared_state().values()])


def two_places(folder: Path, seen: list[Progress]) -> list[Workplace]:
    for seed, site in enumerate("ab"):
        write_easy_site(folder / site, seed)
    return [easy_place(folder / site, PLAN, seen.append, site) for site in "ab"]


def test_pooling_one_site_gives_the_bits_of_its_rounds_alone(tmp_path: Path) -> None:
    """Planted bugs: a step less; batches drawn anew for the pool; another rate from the second round on."""
    place = easy_place(tmp_path, PLAN)
    alone = SiteModel(PLAN)
    optimizer = site_optimizer(alone, place)
    for number in (1, 2):
        train_round(alone, optimizer, None, number, place)

    pooled, metrics = train_pooled([place])

    assert metrics["steps"] == 8
    assert np.array_equal(of(pooled), of(alone))


def test_a_step_goes_along_the_mean_of_the_sites_gradients(tmp_path: Path) -> None:
    """Images of 1 and of 5 give d(w x)/dw = 1 and 5, so 3, and a mean loss of 2 * 3. Planted bug: their sum."""
    place = easy_place(tmp_path, PLAN)
    w = torch.nn.Parameter(torch.tensor(2.0))
    seen = []
    batches = iter([(torch.full((2, 1), float(x)), torch.zeros(2, 1)) for x in (1, 5)])
    optimizer = SiteOptimizer({"w": w}, PLAN.training)

    def look(step: int) -> None:
        assert w.grad is not None
        seen.append(float(w.grad))

    mean = descend(
        place,
        batches,
        Stretch("pooled", 0, 1, lambda _: 0.0, 0, 1),
        Descent(lambda image, _, __: (w * image).mean(), optimizer, look, parts=2),
    )

    assert (seen, mean) == ([3.0], 6.0)


def test_every_site_counts_and_each_is_tuned_by_itself(tmp_path: Path) -> None:
    """Planted bug: the batches of the first site alone."""
    seen: list[Progress] = []
    places = two_places(tmp_path, seen)

    pooled, _ = train_pooled(places)
    tuned = [tune_pooled(pooled, place)[1] for place in places]

    assert not np.array_equal(of(pooled), of(train_pooled(places[:1])[0]))
    assert (seen[0].stage, seen[0].steps) == ("pooled", 8)
    assert [metrics["steps"] for metrics in tuned] == [16.0, 16.0]
    assert len({each.loss for each in seen if each.stage == "calibrate" and each.dice >= 0 and each.step > 0}) == 2
    assert {"dice_test", "dice_test_before", "dice_test_shared", "nsd_test"} <= tuned[0].keys()
