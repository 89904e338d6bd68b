"""`results.json`: every figure of a simulation, and the ledger's exchanges that they come from."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from fedoap.config import Frozen, Plan
from fedoap.errors import ConfigError


class Share(Frozen):
    """What one site gave to one exchange."""

    cases: int = 0
    bytes: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)


class Exchange(Frozen):
    """One exchange of the ledger."""

    kind: Literal["init", "seed", "bank", "train", "calibrate"]
    round: int
    attempt: int
    outcome: str | None
    seconds: float | None
    sites: dict[str, Share]


class Ledger(Frozen):
    """What `fedoap-coordinator results --json` prints."""

    federation: str
    finished: bool
    exchanges: tuple[Exchange, ...]


class SiteResult(Frozen):
    """A site's figures on its test cases, with the federation and alone."""

    dice: float
    dice_local: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    """Of its calibration, the last exchange."""
    metrics_local: dict[str, float] = Field(default_factory=dict)
    """Of training alone."""


class UnseenResult(Frozen):
    """The shared model's figures on the test cases of a site that took no part."""

    dice: float
    metrics: dict[str, float] = Field(default_factory=dict)


class Figures(Frozen):
    """How well masks fit, of one case or on average."""

    dice: float
    iou: float
    hd95: float
    nsd: float


class CaseFigures(Figures):
    """One case's figures."""

    name: str
    patient: str = ""


class EvaluationFile(Frozen):
    """What `fedoap evaluate --json` writes; it stays at the site."""

    site: str
    split: str
    path: Literal["personal", "shared"]
    unit: Literal["mm", "voxel"]
    """Of `hd95` and `tolerance`."""
    tolerance: float
    grid: Literal["file", "network"]
    mean: Figures
    cases: tuple[CaseFigures, ...]


class Results(Frozen):
    """The whole of `results.json`."""

    federation: str
    software: str
    rounds: int
    """Rounds of training that were done."""
    seconds: float
    """From the start of the coordinator to the last figure."""
    sites: dict[str, SiteResult]
    unseen: dict[str, UnseenResult]
    exchanges: tuple[Exchange, ...]
    plan: Plan

    @property
    def dice(self) -> float:
        """Mean over the sites."""
        return sum(site.dice for site in self.sites.values()) / len(self.sites)

    @property
    def dice_local(self) -> float | None:
        """Mean over the sites, each trained alone, where that was done."""
        alone = [site.dice_local for site in self.sites.values() if site.dice_local is not None]
        return sum(alone) / len(alone) if len(alone) == len(self.sites) else None


def read_results(path: Path) -> Results:
    """Return the figures of a `results.json`.

    Raises:
        ConfigError: there is none, or it has another form.
    """
    try:
        return Results.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a simulation that ended leaves one") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
