"""What lies where in a simulation's folder."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from fedoap.config import SiteConfig
from fedoap.errors import ConfigError
from fedoap.simulation.config import SimulationConfig
from fedoap.toml import to_toml

RESULTS = "results.json"
MARKER = ".fedoap-simulation"
"""Marks a folder as a simulation's, which another simulation may delete and replace."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The folder that `--out` names."""

    out: Path

    @property
    def fed_toml(self) -> Path:
        """The coordinator's configuration."""
        return self.out / "coordinator" / "fed.toml"

    @property
    def state(self) -> Path:
        """The coordinator's state folder."""
        return self.out / "coordinator" / "state"

    @property
    def home(self) -> Path:
        """The folder that holds the sites' folders."""
        return self.out / "home"

    @property
    def logs(self) -> Path:
        """Output of every process."""
        return self.out / "logs"

    @property
    def model(self) -> Path:
        """The shared model as the coordinator exports it."""
        return self.out / "model"

    @property
    def results(self) -> Path:
        """The figures of everything."""
        return self.out / RESULTS

    @property
    def report(self) -> Path:
        """The page."""
        return self.out / "report.html"

    def alone(self, site: str) -> Path:
        """Return where a site's local-only job leaves its result."""
        return self.out / "alone" / site

    def evaluation(self, site: str) -> Path:
        """Return the figures of a site's cases."""
        return self.out / "evaluation" / f"{site}.json"

    def pictures(self, site: str) -> Path:
        """Return the folder of a site's pictures."""
        return self.out / "evaluation" / site

    def unseen_toml(self, site: str) -> Path:
        """Return the configuration of a site that takes no part."""
        return self.out / "unseen" / f"{site}.toml"


def make_layout(out: Path, *, overwrite: bool) -> Layout:
    """Return the layout of an empty folder; `overwrite` deletes an earlier simulation there.

    Raises:
        ConfigError: there is something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _refuse_or_empty(out, overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    return Layout(out.absolute())


def _refuse_or_empty(out: Path, *, overwrite: bool) -> None:
    if not overwrite:
        raise ConfigError(f"{out} is not empty; give another --out, or --overwrite to delete what is there")
    if not out.is_dir() or not (out / MARKER).exists():
        raise ConfigError(f"{out} is not the folder of a simulation, so it is not overwritten")
    shutil.rmtree(out)


def write_federation(layout: Layout, config: SimulationConfig) -> None:
    """Write `fed.toml`, for loopback and a port that the system chooses, and the unseen sites' files."""
    placed = {"bind": "tcp://127.0.0.1:*", "advertise": "tcp://127.0.0.1:*", "state": "state"}
    values = config.federation.model_dump()
    _write(layout.fed_toml, to_toml(values | {"coordinator": values["coordinator"] | placed}))
    for name, site in config.unseen.items():
        write_site(layout.unseen_toml(name), site)


def write_site(path: Path, site: SiteConfig) -> None:
    """Write a `site.toml`."""
    _write(path, to_toml(site.model_dump()))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
