"""What each term does to a site's gradients, in numbers worked by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from easy_site import easy_place, easy_plan
from fedoap.config import StrategyConfig
from fedoap.errors import ConfigError, TensorsError
from fedoap.segmentation.sitemodel import SiteModel
from fedoap.segmentation.terms import begin_terms
from fedoap.segmentation.training import site_optimizer, train_round
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

    begun = begin_terms(terms(config), model, 4)
    set_all(model, 5.0, 1.0)
    begun.amend(0)

    assert gradients(model.shared_parameters()) == {2.5}


def test_ditto_pulls_its_own_network_alone() -> None:
    """1 + 0.25 (6 - 2) = 2. Planted bug: the shared weights pulled as well."""
    model, config = site_model(name="ditto", proximal=0.25)
    set_all(model, 2.0, 0.0)

    begun = begin_terms(terms(config), model, 4)
    set_all(model, 6.0, 1.0)
    begun.amend(0)

    assert gradients(model.personal_parameters()) == {2.0}
    assert gradients(model.shared_parameters()) == {1.0}


def test_what_took_no_part_in_a_step_is_not_pulled() -> None:
    model, config = site_model(name="ditto", proximal=0.25)
    begun = begin_terms(terms(config), model, 4)
    set_all(model, 6.0, 1.0)
    for own in model.personal_parameters().values():
        own.grad = None

    begun.amend(0)

    assert gradients(model.personal_parameters()) == set()


def test_fedrep_moves_the_head_first_and_then_the_body() -> None:
    """A quarter of 8 steps is 2. Planted bugs: the body first; both in every step."""
    model, config = site_model(name="fedrep", head_fraction=0.25)
    begun = begin_terms(terms(config), model, 8)
    moved = []

    for step in range(8):
        set_all(model, 1.0, 3.0)
        begun.amend(step)
        moved.append((gradients(model.personal_parameters()), gradients(model.shared_parameters())))

    assert moved == [({3.0}, set())] * 2 + [(set(), {3.0})] * 6


def test_fedreps_steps_are_those_of_the_plan_together(tmp_path: Path) -> None:
    place = easy_place(tmp_path, easy_plan(strategy=StrategyConfig(name="fedrep")))
    model = SiteModel(place.plan)
    optimizer = site_optimizer(model, place)

    metrics = train_round(model, optimizer, None, 2, place)

    moves = {name: int(value) for name, value in optimizer.state().items() if name.endswith(".step")}
    assert metrics["steps"] == 12
    assert (moves["personal.head.weight.step"], moves["encoder.0.conv1.weight.step"]) == (6, 6)


def test_a_round_too_short_for_head_and_body_is_refused() -> None:
    model, config = site_model(name="fedrep")

    with pytest.raises(ConfigError, match="steps_per_round is 1, of which 0 are the head's, but head and body need"):
        begin_terms(terms(config), model, 1)


def test_a_head_first_without_a_head_is_refused() -> None:
    """Else half of the steps would move nothing."""
    config = StrategyConfig(name="fedrep", personal=())

    with pytest.raises(ConfigError, match=r"strategy\.personal is empty, but the strategy's first steps"):
        begin_terms(terms(config), SiteModel(easy_plan(strategy=config)), 8)


def test_scaffold_corrects_by_what_the_others_gradients_were() -> None:
    """c - c_i = 3 - 1; gradients 1 and 4 become 3 and 6, and leave c_i = (1 + 4) / 2.

    Planted bugs: the mean of the corrected gradients; the sum; c_i - c.
    """
    model, config = site_model(name="scaffold")
    model.load_shared({name: np.full_like(value, 3.0) for name, value in model.shared_state().items()})
    model.load_personal({name: np.full_like(value, 1.0) for name, value in model.personal_state().items()})
    begun = begin_terms(terms(config), model, 2)
    seen = []

    for gradient in (1.0, 4.0):
        set_all(model, 0.0, gradient)
        begun.amend(0)
        seen.append(gradients(model.shared_parameters()))
    begun.finish()

    assert seen == [{3.0}, {6.0}]
    assert {float(x) for name, v in model.shared_state().items() if name[:8] == "control." for x in v.flat} == {2.5}
    assert {float(x) for v in model.personal_state().values() for x in v.flat} == {2.5}


def test_control_variates_travel_beside_the_weights_and_are_no_part_of_the_network() -> None:
    """Planted bugs: the site's own sent as c; a missing c refused, so that no exported model can be loaded."""
    model, _ = site_model(name="scaffold")
    plain = {name: value for name, value in model.shared_state().items() if not name.startswith("control.")}
    state = {name: np.full_like(value, 2.0) for name, value in model.shared_state().items()}

    model.load_shared(state)
    model.load_shared({name: state[name] for name in plain})

    assert list(model.shared_state()) == sorted(state)
    assert {float(x) for v in model.shared_state().values() for x in v.flat} == {2.0}
    assert {float(x) for v in model.personal_state().values() for x in v.flat} == {0.0}
    assert list(site_model(name="fedavg")[0].shared_state()) == sorted(plain)
    with pytest.raises(TensorsError, match=r"unknown tensor control\.adapter"):
        site_model(name="fedavg")[0].load_shared(state)


def test_apfl_predicts_with_a_mixture_and_trains_its_own_share_of_it() -> None:
    """0.25 * 5 + 0.75 * 1 = 2; d/dv is 0.25 of d/dmixture. Planted bugs: 1 - alpha; the shared weights trained too."""
    model, _ = site_model(name="apfl", alpha=0.25)
    other = SiteModel(easy_plan(strategy=StrategyConfig(name="local")))
    image = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        for own, shared in zip(model.personal_parameters().values(), other.personal_parameters().values(), strict=True):
            own.copy_(5 * shared)
        for (_, _, w), (_, same, _) in zip(model.twins(), other.twins(), strict=True):
            w.copy_(same)
        for own in other.personal_parameters().values():
            own.mul_(2)

    for one in (model, other):
        torch.autograd.backward([one(image).square().sum()])

    with torch.no_grad():
        torch.testing.assert_close(model(image), other(image))
        torch.testing.assert_close(model.own_network()(image), other(image))
    whole = {name.removeprefix("personal."): own.grad for name, own in other.personal_parameters().items()}
    for name, own in model.personal_parameters().items():
        expected = whole[name.removeprefix("personal.mixed.")]
        assert (own.grad is None) == (expected is None), name
        if own.grad is not None and expected is not None:
            torch.testing.assert_close(own.grad, 0.25 * expected, rtol=1e-3, atol=1e-3)
    assert gradients(model.shared_parameters()) == set()


def test_apfls_two_networks_take_half_of_the_steps_each(tmp_path: Path) -> None:
    place = easy_place(tmp_path, easy_plan(strategy=StrategyConfig(name="apfl")))
    model = SiteModel(place.plan)
    optimizer = site_optimizer(model, place)

    train_round(model, optimizer, None, 1, place)

    moves = {name: int(value) for name, value in optimizer.state().items() if name.endswith(".step")}
    assert (moves["personal.mixed.head.weight.step"], moves["head.weight.step"]) == (6, 6)
