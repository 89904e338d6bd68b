"""What each term does to a site's gradients, in numbers worked by hand."""

import torch

from easy_site import easy_plan
from fedoap.config import StrategyConfig
from fedoap.segmentation.sitemodel import SiteModel
from fedoap.segmentation.terms import amendment
from fedoap.strategies import terms


def site_model(**strategy: str | float) -> tuple[SiteModel, StrategyConfig]:
    config = StrategyConfig.model_validate(strategy)
    return SiteModel(easy_plan(strategy=config)), config


def set_all(model: SiteModel, value: float, gradient: float) -> None:
    """Set every parameter of the site, and its gradient."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
            parameter.grad = torch.full_like(parameter, gradient)


def gradients(parameters: dict[str, torch.nn.Parameter]) -> set[float]:
    return {float(value) for one in parameters.values() if one.grad is not None for value in one.grad.flatten()}


def test_fedprox_pulls_shared_weights_to_where_the_round_began() -> None:
    """1 + 0.5 (5 - 2) = 2.5. Planted bugs: the weights of this step as anchor; the square of the distance."""
    model, config = site_model(name="fedprox", proximal=0.5)
    set_all(model, 2.0, 0.0)

    amend = amendment(terms(config), model)
    set_all(model, 5.0, 1.0)
    amend(0)

    assert gradients(model.shared_parameters()) == {2.5}


def test_ditto_pulls_its_own_network_alone() -> None:
    """1 + 0.25 (6 - 2) = 2. Planted bug: the shared weights pulled as well."""
    model, config = site_model(name="ditto", proximal=0.25)
    set_all(model, 2.0, 0.0)

    amend = amendment(terms(config), model)
    set_all(model, 6.0, 1.0)
    amend(0)

    assert gradients(model.personal_parameters()) == {2.0}
    assert gradients(model.shared_parameters()) == {1.0}


def test_what_took_no_part_in_a_step_is_not_pulled() -> None:
    model, config = site_model(name="ditto", proximal=0.25)
    amend = amendment(terms(config), model)
    set_all(model, 6.0, 1.0)
    for own in model.personal_parameters().values():
        own.grad = None

    amend(0)

    assert gradients(model.personal_parameters()) == set()
