"""What a federation in one process leaves besides its models: each site's figures of every round."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from fedoap.config import Plan
from fedoap.errors import ConfigError
from fedoap.fields import Frozen
from fedoap.manifests import TaskKind

RUN = "federation.json"


class SiteRound(Frozen):
    """A site's part in one round: its training and the exchanges before it."""

    site: str
    stage: Literal["train", "calibrate", "local"]
    """`local` is all of training alone, in one row."""
    round: int
    step: int
    """Gradient steps of the site's course, after this round."""
    cases: int
    """To train on."""
    metrics: dict[str, float]
    """Of `train`: loss, dice_validation; of `calibrate`: dice_test_before, dice_test and others."""
    bytes_sent: int = 0
    bytes_received: int = 0
    """Of blobs, by their manifests; nothing is really sent."""
    seconds: float
    """Of its work."""


class FederationRun(Frozen):
    """The whole of `federation.json`."""

    rounds: tuple[SiteRound, ...]
    """Sorted by round, then in the order of the configuration's sites."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Share:
    """What one site gave to one exchange."""

    site: str
    kind: TaskKind
    round: int
    cases: int
    metrics: dict[str, float]
    bytes_sent: int
    bytes_received: int


def site_rounds(plan: Plan, shares: Sequence[Share]) -> Iterator[SiteRound]:
    """Yield each round of each site; the first weights, which belong to no round, are counted in the first."""
    ends = [share for share in shares if share.kind in ("train", "calibrate")]
    for end in sorted(ends, key=lambda share: share.round):
        mine = [one for one in shares if one.site == end.site and max(1, one.round) == end.round]
        steps, more = plan.training.steps_per_round, plan.calibration.steps
        is_last = end.kind == "calibrate"
        yield SiteRound(
            site=end.site,
            stage="calibrate" if is_last else "train",
            round=end.round,
            step=plan.rounds * steps + more if is_last else end.round * steps,
            cases=end.cases,
            metrics={name: value for name, value in end.metrics.items() if name != "seconds"},
            bytes_sent=sum(one.bytes_sent for one in mine),
            bytes_received=sum(one.bytes_received for one in mine),
            seconds=sum(one.metrics.get("seconds", 0.0) for one in mine),
        )


def read_run(folder: Path) -> FederationRun | None:
    """Return the figures of a federation that ran in a folder, or nothing where none came to its end.

    Raises:
        ConfigError: they have another form.
    """
    path = folder / RUN
    try:
        return FederationRun.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{path}: {error.errors(include_url=False)[0]['msg']}; delete it to run anew") from None
