"""A site's folder: where it is looked for, and what lies where in it.

HOME/<site>/  site.toml                    what the hospital writes
              identity/                    who the site is: keys (0600), federation.json, certificate
              model/model.json             what `fedoap evaluate` and `fedoap predict` run
              state/                       the daemon's: plan, blobs, results, personal parameters, cache
              log.jsonl, worker.log
"""

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from fedoap.errors import ConfigError

HOME_VARIABLE = "FEDOAP_HOME"


@dataclass(frozen=True, slots=True)
class SiteFolder:
    """The paths in one site's folder."""

    path: Path

    @property
    def name(self) -> str:
        """The site's name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """`site.toml`."""
        return self.path / "site.toml"

    @property
    def identity(self) -> Path:
        """Folder of the keys and of what the federation is known by."""
        return self.path / "identity"

    @property
    def federation(self) -> Path:
        """Where the coordinator is, and its public keys."""
        return self.identity / "federation.json"

    @property
    def model(self) -> Path:
        """Folder of the model that the site has now."""
        return self.path / "model"

    @property
    def model_record(self) -> Path:
        """`fedoap.config.ModelRecord` of that model."""
        return self.model / "model.json"

    @property
    def state(self) -> Path:
        """The daemon's own folder."""
        return self.path / "state"

    @property
    def log(self) -> Path:
        """The daemon's log, one JSON object a line."""
        return self.path / "log.jsonl"

    @property
    def worker_log(self) -> Path:
        """What workers wrote on standard error; stays at the site."""
        return self.path / "worker.log"


def homes(home: Path | None = None) -> list[Path]:
    """Return the folders in which sites are looked for, in order; a home that was named is the only one."""
    if home is not None:
        return [home.absolute()]
    named = os.environ.get(HOME_VARIABLE)
    places = [Path(named)] if named else []
    return [place.absolute() for place in (*places, Path(".fedoap"), Path(platformdirs.user_data_dir("fedoap")))]


def find_site(site: str, home: Path | None = None) -> SiteFolder:
    """Return the folder of a site that has joined, in the first home that holds it.

    Raises:
        ConfigError: no home holds it; says where it was looked for.
    """
    places = homes(home)
    for place in places:
        folder = SiteFolder(place / site)
        if folder.federation.is_file():
            return folder
    looked = ", ".join(str(SiteFolder(place / site).federation) for place in places)
    raise ConfigError(f"site {site}: has no folder on this machine, looked for {looked}; join first or name --home")


def home_for_joining(home: Path | None = None) -> Path:
    """Return where a new site's folder goes: the home named, else the first that is there, else the platform's."""
    places = homes(home)
    if home is not None or os.environ.get(HOME_VARIABLE):
        return places[0]
    return next((place for place in places if place.is_dir()), places[-1])
