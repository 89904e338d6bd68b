"""A whole federation in one process: real machines, worker and merges; no socket, no clock, no process.

Events wait in one queue and are handled in the order in which they came. Time stands still while there
are any, then takes a step: so nobody is ever silent or late, sites work one after the other in the
configuration's order, and what comes out is bit for bit what the daemons make of the same configuration.
"""

import hashlib
import shutil
import time
from collections import deque
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from fedoap.config import Plan
from fedoap.errors import ConfigError, ProcessError
from fedoap.fields import Frozen
from fedoap.identity import Member as Enrolled
from fedoap.identity import Roster, curve_keys, signing_keys
from fedoap.protocol.events import Connected, Tick
from fedoap.simulation.config import SimulationConfig
from fedoap.simulation.layout import Layout
from fedoap.sitefolder import SiteFolder
from fedoap.study.coordinator import Keys, StudyCoordinator
from fedoap.study.posts import Post, ToCoordinator, ToSite
from fedoap.study.site import Member, Report, Share, StudySite

STEP_SECONDS = 1.0
RUN = "federation.json"

Stage = Literal["train", "calibrate"]


class SiteRound(Frozen):
    """A site's part in one round: the exchanges that came before its training, and that."""

    site: str
    stage: Stage
    round: int
    step: int
    """Gradient steps of the site's course, after this round."""
    cases: int
    metrics: dict[str, float]
    """Of `train`: loss, dice_validation; of `calibrate`: dice_test_before, dice_test and others."""
    bytes_sent: int
    bytes_received: int
    seconds: float
    """Of its work."""


class FederationRun(Frozen):
    """What a federation leaves beside its models."""

    rounds: tuple[SiteRound, ...]
    """Sorted by round, then in the order of the configuration's sites."""
    seconds: float


def run_federation(
    config: SimulationConfig, folder: Path, report: Report, *, cache: Path | None = None
) -> FederationRun:
    """Train a federation to its end and return its figures; the folder holds its models as `Layout` says.

    `model/` is what the coordinator exports, `home/SITE/model/` what the site's node leaves. The figures
    stand in `federation.json`, written last; without it what lies there is begun anew. Prepared cases are
    kept in `cache`, which many runs may share.

    Raises:
        FedoapError: a site cannot do its work, or the updates cannot be merged.
    """
    began, layout = time.monotonic(), Layout(folder.absolute())
    _clear(layout)
    keys, members = _keys(config)
    sites: dict[str, StudySite] = {}

    def uploaded(upload: bytes) -> Path | None:
        return next((path for site in sites.values() if (path := site.upload(upload))), None)

    coordinator = StudyCoordinator(config.federation, keys, layout.state, uploaded)
    for name in config.federation.sites:
        sites[name] = StudySite(
            members[name],
            config.sites[name],
            SiteFolder(layout.home / name),
            (cache or layout.out / "cache").absolute(),
            coordinator.files,
            report,
        )
    _run(coordinator, sites)
    coordinator.export(layout.model)
    shares = [share for site in sites.values() for share in site.shares]
    run = FederationRun(rounds=tuple(_rounds(config.plan, shares)), seconds=time.monotonic() - began)
    _tidy(layout, sites)
    (layout.out / RUN).write_text(run.model_dump_json(indent=1), encoding="utf-8")
    return run


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


def _run(coordinator: StudyCoordinator, sites: dict[str, StudySite]) -> None:
    now = 0.0
    posts: deque[Post] = deque(coordinator.start(now))
    posts += (ToSite(name, Connected()) for name in sites)
    while not all(site.end for site in sites.values()):
        while posts:
            match posts.popleft():
                case ToCoordinator(event):
                    posts += coordinator.handle(event, now)
                case ToSite(name, event):
                    posts += sites[name].handle(event, now)
        now += STEP_SECONDS
        posts += (ToCoordinator(Tick()), *(ToSite(name, Tick()) for name in sites))
    for name, site in sites.items():
        if site.end != "finished":
            raise ProcessError(f"federation: site {name} left before its end: {site.end}")


def _keys(config: SimulationConfig) -> tuple[Keys, dict[str, Member]]:
    """Return keys that follow from the names alone: they secure nothing, as no byte leaves the process."""
    name, turns = config.federation.federation, count()

    def seed(of: str) -> bytes:
        return hashlib.sha256(f"{name}/{of}".encode()).digest()

    def random_bytes(size: int) -> bytes:
        return hashlib.shake_256(seed(f"random {next(turns)}")).digest(size)

    federation = signing_keys(seed("federation"))
    members = {
        site: Member(site, name, federation.public, seed(f"site {site}"), curve_keys(seed(f"curve {site}")).public)
        for site in config.federation.sites
    }
    enrolled = [Enrolled(one.name, one.curve_key, signing_keys(one.signing_key).public) for one in members.values()]
    return Keys(federation.secret, Roster(1, tuple(enrolled)), random_bytes), members


def _rounds(plan: Plan, shares: list[Share]) -> Iterator[SiteRound]:
    """Yield each round of each site; the first weights, which are of no round, count as its first round's."""
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


def _clear(layout: Layout) -> None:
    """Remove what an earlier run left that did not come to its end."""
    (layout.out / RUN).unlink(missing_ok=True)
    for left in (layout.state.parent, layout.home, layout.model):
        shutil.rmtree(left, ignore_errors=True)


def _tidy(layout: Layout, sites: dict[str, StudySite]) -> None:
    """Remove what only the run itself needed; the models stay."""
    shutil.rmtree(layout.state.parent)
    for site in sites.values():
        for left in ("blobs", "parts", "work"):
            shutil.rmtree(site.folder.state / left)
