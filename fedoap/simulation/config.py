"""`simulate.toml`: a federation and all of its sites in one file.

local_only = true
threads = 1
[federation]            # the whole of fed.toml; `sites` follows from the tables below
[sites.hospital_a]      # the whole of that site's site.toml
[unseen.hospital_z]     # likewise; never trained on, only evaluated with the shared model
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from fedoap.config import FederationConfig, Plan, SiteConfig, with_absolute_data
from fedoap.errors import ConfigError
from fedoap.fields import Frozen, Name
from fedoap.toml import load_toml


class SimulationConfig(Frozen):
    """The whole of `simulate.toml`."""

    federation: FederationConfig
    sites: Annotated[dict[Name, SiteConfig], Field(min_length=1)]
    unseen: dict[Name, SiteConfig] = Field(default_factory=dict)
    """Sites that take no part; the shared model is evaluated on their test cases."""
    local_only: bool = True
    """Also train each site alone for comparison, with the same number of gradient steps."""
    threads: Annotated[int, Field(ge=0)] = 1
    """CPU threads of each training process that does not set its own; 0 lets PyTorch choose."""

    @model_validator(mode="before")
    @classmethod
    def _sites_are_listed(cls, values: object) -> object:
        match values:
            case {"federation": dict(federation), "sites": dict(sites), **rest} if "sites" not in federation:
                return {**rest, "federation": {**federation, "sites": list(sites)}, "sites": sites}
            case _:
                return values

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if set(self.federation.sites) != set(self.sites):
            raise ValueError(
                f"federation.sites is {list(self.federation.sites)}, but the sites described are {list(self.sites)}"
            )
        for name, site in (self.sites | self.unseen).items():
            if site.data is None:
                raise ValueError(f"{name}: data is missing")
        if both := self.sites.keys() & self.unseen.keys():
            raise ValueError(f"{min(both)} is both a site and unseen, but must be one of them")
        if placed := self.federation.coordinator.model_fields_set & {"bind", "advertise", "state"}:
            raise ValueError(f"federation.coordinator.{min(placed)} is given, but a simulation chooses it")
        return self

    @property
    def plan(self) -> Plan:
        """What every site is told."""
        return self.federation.plan


def load_simulation(path: Path) -> SimulationConfig:
    """Return the checked `simulate.toml`, its data paths made absolute.

    Raises:
        ConfigError: naming file, key, value and expectation.
    """
    config = load_toml(path, SimulationConfig)
    sites = {name: _placed(site, path, config.threads) for name, site in config.sites.items()}
    unseen = {name: _placed(site, path, config.threads) for name, site in config.unseen.items()}
    return config.model_copy(update={"sites": sites, "unseen": unseen})


def _placed(site: SiteConfig, path: Path, threads: int) -> SiteConfig:
    placed = with_absolute_data(site, path.parent)
    assert placed.data is not None
    if not placed.data.datalist.is_file():
        raise ConfigError(f"{path}: data.datalist is {placed.data.datalist}, but there is no such file")
    worker = site.worker.model_copy(update={"threads": site.worker.threads or threads})
    return placed.model_copy(update={"worker": worker})
