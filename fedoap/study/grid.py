"""The runs of a study: every variant on every fold with every seed, and what each is made of.

A run is known by its name and by a digest of everything that its figures depend on; a run that is done is
repeated only if that changed. The digest leaves out where files lie and values that equal their defaults, so
neither a moved folder nor a setting that is new to the program repeats a run.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from fedoap import __version__
from fedoap.config import SiteConfig
from fedoap.errors import ConfigError
from fedoap.fields import Frozen
from fedoap.simulation.config import SimulationConfig
from fedoap.study.config import Study
from fedoap.study.lists import Lists
from fedoap.study.tables import Table, changed, nested

RUN_FILE = "run.json"
FOLD_SEEDS = 1000
"""Distance between the seeds of one fold's runs and the next one's."""
PLACES = {"federation": {"coordinator": True}}
"""What a simulation chooses itself, so that a run's file must not hold it."""


class RunFile(Frozen):
    """`run.json`: all settings of one run."""

    study: str
    variant: str
    fold: int
    seed: int
    cut: dict[str, int] = Field(default_factory=dict)
    """Training cases that a site is cut to; empty in the grid's own runs."""
    trial: int | None = None
    """Number of the trial, if the run is one and not of the grid."""
    settings: dict[str, object]
    """Of the trial, or of the trial that was chosen."""
    organs: dict[str, str]
    """Of each site."""
    digest: str
    simulation: SimulationConfig

    @property
    def name(self) -> str:
        """The run's folder."""
        cut = "".join(f"-{site}{cases}" for site, cases in self.cut.items())
        trial = "" if self.trial is None else f"-t{self.trial}"
        return f"{self.variant}-f{self.fold}-s{self.seed}{cut}{trial}"

    def to_json(self) -> str:
        """Return the file's text."""
        return self.model_dump_json(indent=1, exclude={"simulation": PLACES})


@dataclass(frozen=True, slots=True)
class Grid:
    """A study, the datalists of its folds, and where prepared images are kept."""

    study: Study
    lists: Lists

    def runs(self, variant: str, settings: Table) -> Iterator[RunFile]:
        """Yield a variant's runs with these settings: the grid's, then those with fewer cases.

        Raises:
            ConfigError: the settings do not fit.
        """
        config = self.study.config
        folds = [(fold, seed) for fold in range(max(1, config.folds)) for seed in config.seeds]
        for fold, seed in folds:
            yield self.run(variant, settings, fold, seed)
        sizes = config.sizes
        if sizes is None or (sizes.variants and variant not in sizes.variants):
            return
        for fold, seed in folds:
            for cases in sizes.cases:
                if cases < self.lists.of(fold, sizes.site).training:
                    yield self.run(variant, settings, fold, seed, cut={sizes.site: cases})

    def run(
        self,
        variant: str,
        settings: Table,
        fold: int,
        seed: int,
        *,
        cut: Mapping[str, int] | None = None,
        trial: int | None = None,
    ) -> RunFile:
        """Return one run.

        Raises:
            ConfigError: the settings do not fit.
        """
        study = self.study
        table = changed(nested(settings), {"federation": {"seed": seed + FOLD_SEEDS * fold}})
        for site, cases in (cut or {}).items():
            table = changed(table, {"sites": {site: {"data": {"max_training_cases": cases}}}})
        asked = study.simulation(variant, table)
        names = [*asked.sites, *asked.unseen]
        return RunFile(
            study=study.config.name,
            variant=variant,
            fold=fold,
            seed=seed,
            cut=dict(cut or {}),
            trial=trial,
            settings=dict(settings),
            organs={name: study.organ(name) for name in names},
            digest=_digest(asked, {name: self.lists.of(fold, name).digest for name in names}),
            simulation=_placed(asked, {name: self.lists.of(fold, name).path for name in names}),
        )


def read_run(folder: Path) -> RunFile:
    """Return the settings of a run's folder.

    Raises:
        ConfigError: there is no run.
    """
    try:
        return RunFile.model_validate_json((folder / RUN_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / RUN_FILE}: is no run of a study: {error}") from None


def _digest(asked: SimulationConfig, lists: Mapping[str, str]) -> str:
    where = {"data": {"datalist": True, "root": True}}
    every = {"__all__": where}
    settings = asked.model_dump(mode="json", exclude_defaults=True, exclude=PLACES | {"sites": every, "unseen": every})
    text = json.dumps([__version__, settings, lists], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _placed(asked: SimulationConfig, paths: Mapping[str, Path]) -> SimulationConfig:
    def placed(sites: Mapping[str, SiteConfig]) -> dict[str, SiteConfig]:
        return {name: _site(site, paths[name], asked.threads) for name, site in sites.items()}

    return asked.model_copy(update={"sites": placed(asked.sites), "unseen": placed(asked.unseen)})


def _site(site: SiteConfig, path: Path, threads: int) -> SiteConfig:
    assert site.data is not None
    data = site.data.model_copy(update={"datalist": path, "root": path.parent})
    worker = site.worker.model_copy(update={"threads": site.worker.threads or threads})
    return site.model_copy(update={"data": data, "worker": worker})
