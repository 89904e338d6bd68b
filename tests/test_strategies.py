"""The federated algorithms' table."""

import re
from pathlib import Path

import pytest

from fedoap.config import StrategyConfig
from fedoap.errors import ConfigError
from fedoap.params import check_parts
from fedoap.server import Adaptive, Average, Momentum
from fedoap.strategies import (
    STRATEGIES,
    Proximal,
    SharedPath,
    check_federated,
    find_strategy,
    personal_parts,
    server_of,
    shared_path_fraction,
    terms,
)

TABLE = Path(__file__).parents[1] / "docs" / "strategies.md"
FEDERATED = [name for name, strategy in STRATEGIES.items() if not strategy.only_in_studies]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_names_known_parts_and_its_source(name: str) -> None:
    strategy = find_strategy(name)

    check_parts(strategy.personal)
    assert strategy.title
    assert strategy.source


def test_the_page_has_a_row_for_every_strategy_with_its_parts_and_its_source() -> None:
    """Planted bug: an entry of the table that the page does not have."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE))

    assert list(rows) == list(STRATEGIES)
    for name, strategy in STRATEGIES.items():
        assert rows[name].startswith(", ".join(strategy.personal) or "-"), name
        for paper in re.findall(r"arXiv:([\d.]+\d)", strategy.source):
            assert paper in rows[name], name


def test_the_operators_list_takes_the_place_of_the_strategys() -> None:
    assert personal_parts(StrategyConfig(name="fedavg")) == ()
    assert personal_parts(StrategyConfig(name="fedavg", personal=("norms",))) == ("norms",)
    assert personal_parts(StrategyConfig(name="fedoap", personal=())) == ()


def test_an_unknown_part_in_the_operators_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"strategy.personal names adaptor, .*did you mean adapter\?"):
        personal_parts(StrategyConfig(personal=("adaptor",)))


@pytest.mark.parametrize(
    ("name", "text"),
    [("fedaverage", r"did you mean fedavg\?"), ("xyz", "known are apfl, ditto, fedadagrad, fedadam")],
)
def test_an_unknown_strategy_is_refused_with_those_known(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        find_strategy(name)


def test_only_strategies_with_shared_twins_spend_steps_on_the_shared_path() -> None:
    fractions = {name: shared_path_fraction(StrategyConfig(name=name), 0.2) for name in STRATEGIES}

    assert {name: value for name, value in fractions.items() if value} == {
        "fedoap": 0.2,
        "ditto": 0.5,
        "apfl": 0.5,
        "feddp": 0.2,
    }


def test_the_operators_numbers_take_the_place_of_the_strategys() -> None:
    """Planted bug: `or`, by which 0 counts as not given."""
    adam = StrategyConfig(name="fedadam", server_learning_rate=0.5, server_beta1=0.0, server_tau=2.0)

    assert server_of(StrategyConfig(name="fedadam")) == Adaptive("adam", 0.01, 0.9, 0.99, 1e-3)
    assert server_of(adam) == Adaptive("adam", 0.5, 0.0, 0.99, 2.0)
    assert server_of(StrategyConfig(name="fedavgm", server_beta1=0.0)) == Momentum(1.0, 0.0)
    assert server_of(StrategyConfig(server_learning_rate=0.5)) == Average(0.5)
    assert terms(StrategyConfig(name="fedprox")) == (Proximal("shared", 0.01),)
    assert terms(StrategyConfig(name="ditto", proximal=0.0)) == (SharedPath(0.5), Proximal("personal", 0.0))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (StrategyConfig(name="fedavg", server_beta2=0.9), "server_beta2 is 0.9, but fedavg does not use it; fedadag"),
        (
            StrategyConfig(name="fedbn", proximal=0.1),
            "proximal is 0.1, but fedbn does not use it; fedoap, fedprox, d",
        ),
        (StrategyConfig(name="local"), "strategy.name is local, which no coordinator runs: it federates nothing"),
    ],
)
def test_a_number_that_is_not_used_is_refused_instead_of_ignored(config: StrategyConfig, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_federated(config)


@pytest.mark.parametrize("name", FEDERATED)
def test_a_coordinator_runs_every_other_strategy_as_it_comes(name: str) -> None:
    check_federated(StrategyConfig(name=name))
