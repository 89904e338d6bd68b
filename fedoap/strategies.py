"""The federated algorithms, as data: what each keeps at a site, and where it was published.

The protocol knows no strategy. A site asks `personal_parts` which parameters stay with it, and the
coordinator averages whatever is shared. A further algorithm is one more entry of `STRATEGIES`.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from fedoap.config import StrategyConfig
from fedoap.errors import ConfigError
from fedoap.params import check_parts


@dataclass(frozen=True, slots=True)
class Strategy:
    """One algorithm."""

    title: str
    source: str
    personal: tuple[str, ...]
    """Parts and selectors of `fedoap.params` that never leave a site."""
    trains_shared_path: bool = False
    """Whether a share of the steps (`training.shared_path_fraction`) trains the shared twins of personal parts."""


STRATEGIES: Mapping[str, Strategy] = {
    "fedoap": Strategy(
        title="FedOAP: personal query branch, adapter and head; shared keys, values and decoder",
        source="Tashdeed et al. 2025, arXiv:2511.18847; shared twins and bank are this project's",
        personal=("bottleneck_q", "query", "gate", "adapter", "head"),
        trains_shared_path=True,
    ),
    "fedavg": Strategy(
        title="FedAvg: one model for all sites",
        source="McMahan et al. 2017, algorithm 1, arXiv:1602.05629",
        personal=(),
    ),
    "local": Strategy(
        title="Local: each site trains alone",
        source="the lower bound that every federated method is held against",
        personal=("all",),
    ),
}


def find_strategy(name: str) -> Strategy:
    """Return the strategy of this name.

    Raises:
        ConfigError: there is none; the text names those known.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    near = difflib.get_close_matches(name, STRATEGIES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(STRATEGIES))}"
    raise ConfigError(f"strategy.name is {name}, which is no known strategy; {hint}")


def personal_parts(config: StrategyConfig) -> tuple[str, ...]:
    """Return what stays at the site: the operator's own list, or the strategy's.

    Raises:
        ConfigError: the strategy is unknown, or the list names something that is no part.
    """
    parts = find_strategy(config.name).personal if config.personal is None else config.personal
    check_parts(parts)
    return parts


def shared_path_fraction(config: StrategyConfig, configured: float) -> float:
    """Return the share of steps on the shared path: 0 where the strategy has no use for it."""
    return configured if find_strategy(config.name).trains_shared_path else 0.0
