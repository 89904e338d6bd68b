"""`results.json`: every figure of a simulation, and the ledger's exchanges that they come from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from fedoap import __version__
from fedoap.config import Plan
from fedoap.errors import ConfigError
from fedoap.fields import Frozen


class Share(Frozen):
    """What one site contributed to one exchange."""

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
    """A site's figures on its test cases, with the federation and alone; `dice` is None before its calibration."""

    dice: float | None = None
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
    plan: Plan | None = None
    """Unknown if the results are those of the coordinator alone."""

    @property
    def dice(self) -> float | None:
        """Mean over the sites, if all have one."""
        return _mean([site.dice for site in self.sites.values()])

    @property
    def dice_local(self) -> float | None:
        """Mean over the sites, each trained alone, if that was done."""
        return _mean([site.dice_local for site in self.sites.values()])


def from_ledger(ledger: Ledger) -> Results:
    """Return what the coordinator alone knows: the exchanges, and each site's figures after its calibration."""
    done = [each for each in ledger.exchanges if each.outcome == "done"]
    names = dict.fromkeys(name for each in done for name in each.sites)
    last = {name: share.metrics for each in done if each.kind == "calibrate" for name, share in each.sites.items()}
    return Results(
        federation=ledger.federation,
        software=f"fedoap {__version__}",
        rounds=sum(each.kind == "train" for each in done),
        seconds=round(sum(each.seconds or 0.0 for each in ledger.exchanges), 1),
        sites={name: SiteResult(dice=_test_dice(last, name), metrics=last.get(name, {})) for name in names},
        unseen={},
        exchanges=ledger.exchanges,
    )


def read_results(path: Path) -> Results:
    """Return the figures of a simulation's `results.json`, or of what `fedoap-coordinator results --json` printed.

    Raises:
        ConfigError: there is none, or it has another form.
    """
    try:
        text = path.read_bytes()
        values = json.loads(text)
        is_ledger = isinstance(values, dict) and "finished" in values
        return from_ledger(Ledger.model_validate_json(text)) if is_ledger else Results.model_validate_json(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a simulation that ended leaves one") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None


def _test_dice(metrics: Mapping[str, Mapping[str, float]], site: str) -> float | None:
    return metrics.get(site, {}).get("dice_test")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
