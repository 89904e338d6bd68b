"""`study.toml`: what is compared, on which cases, how often.

name = "organs"
base = "tumours.toml"                       # a simulate.toml, from this file's folder
folds = 5                                   # 0: the datalists' own split
seeds = [0]
[variants.fedavg.federation.strategy]       # changes to the base, any key of it
name = "fedavg"
[search]                                    # trials of settings on the validation cases
[sizes]                                     # one site's training cases cut to so many
[partition.brain.north]                     # one site's patients shared out among several
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self, TypeAlias

from pydantic import Field, ValidationError, model_validator

from fedoap.errors import ConfigError
from fedoap.fields import Frozen, Name, Positive
from fedoap.simulation.config import SimulationConfig
from fedoap.strategies import check_federated, find_strategy
from fedoap.study.tables import Table, changed
from fedoap.toml import first_line, load_toml

Settings: TypeAlias = dict[str, Annotated[tuple[object, ...], Field(min_length=1)]]
"""Values to try of dotted keys, such as "federation.training.learning_rate"."""


class Search(Frozen):
    """Trials of settings before the grid: as many for each variant, on the first fold and seed."""

    trials: Annotated[int, Field(ge=1)]
    """Of each variant that is searched; drawn at random if its settings have more combinations."""
    settings: Settings = Field(default_factory=dict)
    """For all variants."""
    variants: dict[Name, Settings] = Field(default_factory=dict)
    """For one variant, besides those for all or, under the same key, instead of them."""
    like: dict[Name, Name] = Field(default_factory=dict)
    """Variants, mostly ablations, that take over what another one's trials chose."""


class Sizes(Frozen):
    """Runs besides the grid in which one site has fewer training cases."""

    site: Name
    cases: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (6, 12, 25, 50)
    variants: tuple[Name, ...] = ()
    """All of the study's if none is given."""


class Hospital(Frozen):
    """A part of a site's patients, and how its scanner differs; images are grey levels in [0, 1]."""

    share: Annotated[float, Field(gt=0, le=1)]
    """Of the cases; met as closely as whole patients allow."""
    gamma: Positive = 1.0
    """Exponent of the grey levels."""
    contrast: Positive = 1.0
    """Factor of their distance from the image's mean."""
    resolution: Annotated[float, Field(ge=0.25, le=1)] = 1.0
    """Share of the pixels along each edge that is kept; the image's size stays."""
    noise: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Standard deviation of normal noise."""


class StudyConfig(Frozen):
    """The whole of `study.toml`."""

    name: Name
    base: Path
    folds: Annotated[int, Field(ge=0, le=20)] = 0
    """Folds of a cross-validation by patient over the union of a site's lists; 0 takes the lists as they are."""
    sites: tuple[Name, ...] = ()
    """The base's sites that take part; all if none is given."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=1000)], ...], Field(min_length=1)] = (0,)
    """A run's federation.seed is its seed + 1000 x its fold."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Fixes folds, partition and noise."""
    validation: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    """Share of the cases outside the tested fold that validate instead of train."""
    variants: Annotated[dict[Name, dict[str, object]], Field(min_length=1)]
    search: Search | None = None
    sizes: Sizes | None = None
    partition: dict[Name, Annotated[dict[Name, Hospital], Field(min_length=1)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}, but each may occur once")
        if self.folds == 1:
            raise ValueError("folds is 1, but cross-validation needs 2; 0 takes the datalists' own split")
        for site, hospitals in self.partition.items():
            if (total := sum(each.share for each in hospitals.values())) > 1 + 1e-9:
                raise ValueError(f"partition.{site} shares out {total:g} of its cases, but there is only 1")
        for key, names in self._named().items():
            for name in names:
                if name not in self.variants:
                    raise ValueError(f"{key} names {name}, but the variants are {', '.join(self.variants)}")
        for name, other in (self.search.like if self.search else {}).items():
            if self.search and other in self.search.like:
                raise ValueError(f"search.like.{name} is {other}, which has no trials of its own")
        return self

    def _named(self) -> Mapping[str, tuple[str, ...]]:
        search = self.search or Search(trials=1)
        return {
            "search.variants": tuple(search.variants),
            "search.like": (*search.like, *search.like.values()),
            "sizes.variants": self.sizes.variants if self.sizes else (),
        }


class Study:
    """A checked study: its configuration, and each variant's merged simulation."""

    def __init__(self, path: Path, config: StudyConfig, base: Table, base_path: Path) -> None:
        self.path, self.config, self.base_path = path, config, base_path
        self._base = _partitioned(base, config)
        self.base = SimulationConfig.model_validate(self._base)
        """The base, each site that is divided replaced by its hospitals."""

    def table(self, variant: str, settings: Table | None = None) -> Table:
        """Return the base with a variant's changes, and those of a trial's settings."""
        return changed(changed(self._base, self.config.variants[variant]), settings or {})

    def simulation(self, variant: str, settings: Table | None = None) -> SimulationConfig:
        """Return a variant's simulation; its data paths are as the base has them.

        Raises:
            ConfigError: naming file, variant, key, value and expectation.
        """
        try:
            found = SimulationConfig.model_validate(self.table(variant, settings))
            if not find_strategy(found.federation.strategy.name).only_in_studies:
                check_federated(found.federation.strategy)
        except ValidationError as error:
            raise self._error(variant, first_line(error, SimulationConfig)) from None
        except ConfigError as error:
            raise self._error(variant, str(error)) from None
        return found.model_copy(update={"local_only": False})

    def organ(self, site: str) -> str:
        """Return the organ of a site: the site itself, or in a partition the site that was divided."""
        return next((organ for organ, hospitals in self.config.partition.items() if site in hospitals), site)

    def hospital(self, site: str) -> Hospital | None:
        """Return the hospital that a site of a partition is, or None for another site."""
        return self.config.partition.get(self.organ(site), {}).get(site)

    def _error(self, variant: str, text: str) -> ConfigError:
        return ConfigError(f"{self.path}: variants.{variant}: {text}")


def load_study(path: Path) -> Study:
    """Return the checked study; every variant was checked with it.

    Raises:
        ConfigError: naming file, key, value and expectation.
    """
    config = load_toml(path, StudyConfig)
    base_path = path.parent / config.base
    base = _base(base_path)
    _check_partition(path, config, base)
    study = Study(path, config, base, base_path)
    for variant in config.variants:
        _check_cases(study, variant)
    if config.sizes and config.sizes.site not in study.base.sites:
        raise ConfigError(f"{path}: sizes.site is {config.sizes.site}, but the sites are {', '.join(study.base.sites)}")
    return study


def _check_partition(path: Path, config: StudyConfig, base: Table) -> None:
    known = _sites(base)
    for key, asked in (("sites", config.sites), ("partition", tuple(config.partition))):
        if wrong := next((site for site in asked if site not in known), None):
            raise ConfigError(f"{path}: {key} names {wrong}, but the base has {', '.join(known)}")
    names = [site for site in config.sites or known if site not in config.partition]
    for site, hospitals in config.partition.items():
        if config.sites and site not in config.sites:
            raise ConfigError(f"{path}: partition names {site}, but sites leaves it out")
        names += hospitals
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{path}: partition makes a site {twice}, but there is another of this name")


def _check_cases(study: Study, variant: str) -> None:
    """Refuse a variant that sees other cases than the base: it could not be compared with the others."""
    found = study.simulation(variant)
    for name, site in (found.sites | found.unseen).items():
        base = study.base.sites.get(name) or study.base.unseen.get(name)
        assert site.data is not None
        if base is None or base.data is None:
            raise ConfigError(
                f"{study.path}: variants.{variant}: {name} is no site of the base, but all run on its sites"
            )
        if (site.data.datalist, site.data.root) != (base.data.datalist, base.data.root):
            raise ConfigError(f"{study.path}: variants.{variant}: {name}.data names other images than the base")


def _base(path: Path) -> Table:
    load_toml(path, SimulationConfig)
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _sites(base: Table) -> Table:
    sites = base["sites"]
    assert isinstance(sites, dict)
    return sites


def _partitioned(base: Table, config: StudyConfig) -> Table:
    """Return the base with the sites that take part, each that is divided replaced by its hospitals."""
    alone: Mapping[str, object] = {}
    taking_part = {name: site for name, site in _sites(base).items() if not config.sites or name in config.sites}
    sites = {name: site for old, site in taking_part.items() for name in config.partition.get(old, alone) or (old,)}
    return changed(base, {}) | {"sites": sites}
