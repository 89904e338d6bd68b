"""The federated algorithms' table."""

import pytest

from fedoap.config import StrategyConfig
from fedoap.errors import ConfigError
from fedoap.params import check_parts
from fedoap.strategies import STRATEGIES, find_strategy, personal_parts, shared_path_fraction


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_names_known_parts_and_its_source(name: str) -> None:
    strategy = find_strategy(name)

    check_parts(strategy.personal)
    assert strategy.title
    assert strategy.source


def test_the_operators_list_takes_the_place_of_the_strategys() -> None:
    assert personal_parts(StrategyConfig(name="fedavg")) == ()
    assert personal_parts(StrategyConfig(name="fedavg", personal=("norms",))) == ("norms",)
    assert personal_parts(StrategyConfig(name="fedoap", personal=())) == ()


def test_an_unknown_part_in_the_operators_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"strategy.personal names adaptor, .*did you mean adapter\?"):
        personal_parts(StrategyConfig(personal=("adaptor",)))


@pytest.mark.parametrize(
    ("name", "text"), [("fedaverage", r"did you mean fedavg\?"), ("xyz", "known are fedavg, fedoap, local")]
)
def test_an_unknown_strategy_is_refused_with_those_known(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        find_strategy(name)


def test_only_strategies_with_shared_twins_spend_steps_on_the_shared_path() -> None:
    fractions = {name: shared_path_fraction(StrategyConfig(name=name), 0.2) for name in STRATEGIES}

    assert fractions == {"fedoap": 0.2, "fedavg": 0.0, "local": 0.0}
