"""The federated algorithms as data: what each keeps at a site, what it adds to the steps, where it was published.

The protocol knows no strategy. A site asks `personal_parts` which parameters stay with it and `terms` what
changes its gradient steps; the coordinator asks `server_of` how it uses the sites' mean. A further algorithm
is one more entry of `STRATEGIES`. docs/strategies.md shows the table and the deviations from the papers.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias

from fedoap.config import StrategyConfig
from fedoap.errors import ConfigError
from fedoap.params import check_parts
from fedoap.server import Adaptive, Average, Momentum, Server

AVERAGE = Average()


@dataclass(frozen=True, slots=True)
class SharedPath:
    """A share of the steps trains the shared network, complete without personal parts; the others the site's own."""

    fraction: float | None = None
    """`training.shared_path_fraction` if not given."""


@dataclass(frozen=True, slots=True)
class Proximal:
    """mu/2 ||w - w_t||^2 holds shared or personal parameters near the shared weights that the round began with."""

    on: Literal["shared", "personal"]
    mu: float


@dataclass(frozen=True, slots=True)
class HeadFirst:
    """A round's first steps move only the personal parts, the others only the shared ones."""

    fraction: float


@dataclass(frozen=True, slots=True)
class Controls:
    """Each gradient is corrected by c - c_i: the last mean gradient of all sites, less that of this site."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A site predicts with alpha v + (1 - alpha) w: its own weights and the shared ones, mixed."""

    alpha: float


@dataclass(frozen=True, slots=True)
class Inconsistency:
    """Calibration weights voxels by how much the site's own and the shared network disagree about them."""


Term: TypeAlias = SharedPath | Proximal | HeadFirst | Controls | Mixture | Inconsistency


@dataclass(frozen=True, slots=True)
class Strategy:
    """One algorithm."""

    title: str
    source: str
    personal: tuple[str, ...] = ()
    """Parts and selectors of `fedoap.params` that never leave a site."""
    terms: tuple[Term, ...] = ()
    """What changes a site's gradient steps."""
    server: Server = AVERAGE
    """How the coordinator uses the sites' mean."""
    only_in_studies: str = ""
    """Why no coordinator runs it; empty if one does."""


STRATEGIES: Mapping[str, Strategy] = {
    "fedoap": Strategy(
        title="FedOAP: personal query branch, adapter and head; shared keys, values and decoder",
        source="Tashdeed et al. 2025, arXiv:2511.18847; shared twins and bank are this project's",
        personal=("bottleneck_q", "query", "gate", "adapter", "head"),
        terms=(SharedPath(), Proximal("personal", 0.0)),
    ),
    "fedavg": Strategy(
        title="FedAvg: one model for all sites",
        source="McMahan et al. 2017, algorithm 1, arXiv:1602.05629",
    ),
    "fedprox": Strategy(
        title="FedProx: FedAvg, each step held near the round's shared weights",
        source="Li et al. 2020, eq. 2, arXiv:1812.06127",
        terms=(Proximal("shared", 0.01),),
    ),
    "fedavgm": Strategy(
        title="FedAvgM: FedAvg with momentum at the coordinator",
        source="Hsu et al. 2019, section 4.3, arXiv:1909.06335",
        server=Momentum(),
    ),
    "fedadagrad": Strategy(
        title="FedAdagrad: Adagrad at the coordinator",
        source="Reddi et al. 2021, algorithm 2, arXiv:2003.00295",
        server=Adaptive("adagrad", beta1=0.0),
    ),
    "fedadam": Strategy(
        title="FedAdam: Adam at the coordinator",
        source="Reddi et al. 2021, algorithm 2, arXiv:2003.00295",
        server=Adaptive("adam"),
    ),
    "fedyogi": Strategy(
        title="FedYogi: Yogi at the coordinator",
        source="Reddi et al. 2021, algorithm 2, arXiv:2003.00295",
        server=Adaptive("yogi"),
    ),
    "scaffold": Strategy(
        title="SCAFFOLD: FedAvg, each gradient corrected for the drift of its site",
        source="Karimireddy et al. 2020, algorithm 1, arXiv:1910.06378",
        terms=(Controls(),),
    ),
    "fedbn": Strategy(
        title="FedBN: FedAvg with personal norms",
        source="Li et al. 2021, algorithm 1, arXiv:2102.07623",
        personal=("norms",),
    ),
    "fedper": Strategy(
        title="FedPer: FedAvg with personal last layers",
        source="Arivazhagan et al. 2019, algorithm 1, arXiv:1912.00818",
        personal=("adapter", "head"),
    ),
    "fedrep": Strategy(
        title="FedRep: personal last layers, trained before the shared rest in each round",
        source="Collins et al. 2021, algorithm 1, arXiv:2102.07078",
        personal=("adapter", "head"),
        terms=(HeadFirst(0.5),),
    ),
    "ditto": Strategy(
        title="Ditto: a network of the site's own, held near the shared one, beside FedAvg",
        source="Li et al. 2021, algorithm 1, arXiv:2012.04221",
        personal=("all",),
        terms=(SharedPath(0.5), Proximal("personal", 0.01)),
    ),
    "apfl": Strategy(
        title="APFL: a mixture of the shared network and one of the site's own, beside FedAvg",
        source="Deng et al. 2020, algorithm 1, arXiv:2003.13461",
        personal=("all",),
        terms=(SharedPath(0.5), Mixture(0.5)),
    ),
    "feddp": Strategy(
        title="FedDP: personal query, then calibration where the networks disagree",
        source="Wang et al. 2023, local query and inconsistency-guided calibration, doi:10.1109/TMI.2023.3299206",
        personal=("query",),
        terms=(SharedPath(), Inconsistency()),
    ),
    "local": Strategy(
        title="Local: each site trains alone",
        source="the lower bound that every federated method is held against",
        personal=("all",),
        only_in_studies="it federates nothing: `fedoap simulate` trains each site alone where local_only is true",
    ),
    "pooled": Strategy(
        title="Pooled: one network on all sites' images, then calibrated at each site",
        source="the upper bound that every federated method is held against",
        only_in_studies="it needs all images in one place, where only a study has them",
    ),
}


def find_strategy(name: str) -> Strategy:
    """Return the strategy of this name.

    Raises:
        ConfigError: there is none; the text names the nearest, or those known.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    near = difflib.get_close_matches(name, STRATEGIES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(STRATEGIES))}"
    raise ConfigError(f"strategy.name is {name}, which is no known strategy; {hint}")


def check_federated(config: StrategyConfig) -> None:
    """Return if a coordinator can run the strategy and the strategy uses every number that is given.

    Raises:
        ConfigError: the strategy is unknown, or for studies only; a part is unknown; a number is not used.
    """
    strategy = find_strategy(config.name)
    if strategy.only_in_studies:
        raise ConfigError(f"strategy.name is {config.name}, which no coordinator runs: {strategy.only_in_studies}")
    personal_parts(config)
    terms(config)
    server_of(config)


def personal_parts(config: StrategyConfig) -> tuple[str, ...]:
    """Return what stays at the site: the operator's own list, or the strategy's.

    Raises:
        ConfigError: the strategy is unknown, or the list names something that is no part.
    """
    parts = find_strategy(config.name).personal if config.personal is None else config.personal
    check_parts(parts)
    return parts


def terms(config: StrategyConfig) -> tuple[Term, ...]:
    """Return what changes a site's steps, with the operator's numbers in place of the strategy's.

    Raises:
        ConfigError: the strategy is unknown, or has no term that uses a given number.
    """
    found = find_strategy(config.name).terms
    for key, kind in _TERM_NUMBERS.items():
        value: float | None = getattr(config, key)
        if value and not any(isinstance(term, kind) for term in found):
            users = [n for n, s in STRATEGIES.items() if any(isinstance(term, kind) for term in s.terms)]
            raise _no_use(key, value, config.name, users)
    return tuple(_with_numbers(term, config) for term in found)


def server_of(config: StrategyConfig) -> Server:
    """Return the server optimizer, with the operator's numbers in place of the strategy's.

    Raises:
        ConfigError: the strategy is unknown, or its optimizer does not use a given number.
    """
    server = find_strategy(config.name).server
    for key, name in _SERVER_NUMBERS.items():
        value: float | None = getattr(config, key)
        if value is not None and name not in _numbers(server):
            users = [n for n, strategy in STRATEGIES.items() if name in _numbers(strategy.server)]
            raise _no_use(key, value, config.name, users)
    eta = server.eta if config.server_learning_rate is None else config.server_learning_rate
    if isinstance(server, Average):
        return Average(eta)
    beta1 = server.beta1 if config.server_beta1 is None else config.server_beta1
    if isinstance(server, Momentum):
        return Momentum(eta, beta1)
    beta2 = server.beta2 if config.server_beta2 is None else config.server_beta2
    tau = server.tau if config.server_tau is None else config.server_tau
    return Adaptive(server.kind, eta, beta1, beta2, tau)


def server_words(config: StrategyConfig) -> str:
    """Return the server optimizer in words, each number by its key.

    >>> server_words(StrategyConfig(name="fedavg", server_learning_rate=0.5))
    'server_learning_rate 0.5'
    """
    server = server_of(config)
    known = _numbers(server)
    numbers = [f"{key} {getattr(server, name)}" for key, name in _SERVER_NUMBERS.items() if name in known]
    return ", ".join(numbers if isinstance(server, Average) else [f"server {config.name}", *numbers])


def shared_path_fraction(config: StrategyConfig, configured: float) -> float:
    """Return the share of steps on the shared path: 0 if the strategy does not train it."""
    for term in find_strategy(config.name).terms:
        if isinstance(term, SharedPath):
            return configured if term.fraction is None else term.fraction
    return 0.0


_SERVER_NUMBERS: Mapping[str, str] = {
    "server_learning_rate": "eta",
    "server_beta1": "beta1",
    "server_beta2": "beta2",
    "server_tau": "tau",
}
"""Keys of `[strategy]`, and what the server optimizers call them."""
_TERM_NUMBERS: Mapping[str, type[Term]] = {"proximal": Proximal, "head_fraction": HeadFirst, "alpha": Mixture}
"""Keys of `[strategy]`, and the term that uses each."""


def _with_numbers(term: Term, config: StrategyConfig) -> Term:
    match term:
        case Proximal() if config.proximal is not None:
            return replace(term, mu=config.proximal)
        case HeadFirst() if config.head_fraction is not None:
            return replace(term, fraction=config.head_fraction)
        case Mixture() if config.alpha is not None:
            return replace(term, alpha=config.alpha)
        case _:
            return term


def _numbers(server: Server) -> frozenset[str]:
    return frozenset(field.name for field in fields(server))


def _no_use(key: str, value: float, name: str, users: list[str]) -> ConfigError:
    return ConfigError(f"strategy.{key} is {value:g}, but {name} does not use it; {', '.join(users)} do")
