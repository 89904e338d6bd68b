"""A whole federation in one process: real machines, worker and merges; no socket, no clock, no process.

Events wait in one queue and are handled in the order of their arrival. Time stands still while there are
any, then takes a step. So nobody is ever silent or late, sites work one after the other in the
configuration's order, and the result is bit for bit that of the daemons with the same configuration.
"""

import hashlib
import shutil
import time
from collections import deque
from itertools import count
from pathlib import Path

from fedoap.errors import ProcessError
from fedoap.identity import Member as Enrolled
from fedoap.identity import Roster, curve_keys, signing_keys
from fedoap.protocol.events import Connected, Tick
from fedoap.simulation.config import SimulationConfig
from fedoap.simulation.layout import Layout
from fedoap.sitefolder import SiteFolder
from fedoap.study.coordinator import Keys, StudyCoordinator
from fedoap.study.figures import RUN, FederationRun, site_rounds
from fedoap.study.models import before_folder, record_before
from fedoap.study.posts import Post, ToCoordinator, ToSite
from fedoap.study.site import Member, StudySite
from fedoap.study.work import Report

STEP_SECONDS = 1.0


def run_federation(
    config: SimulationConfig, folder: Path, report: Report, *, cache: Path | None = None
) -> FederationRun:
    """Train a federation to its end and return its figures; the folder holds its models as `Layout` says.

    `model/` is what the coordinator exports, `home/SITE/model/` what the site's node leaves, `home/SITE/before/`
    the latter before calibration. The figures are in `federation.json`, written last; without it a new run
    starts afresh. Prepared cases are kept in `cache`, which many runs may share.

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
    model = coordinator.export(layout.model)
    for name in sites:
        record_before(model, before_folder(layout, name))
    shares = [share for site in sites.values() for share in site.shares]
    run = FederationRun(rounds=tuple(site_rounds(config.plan, shares)), seconds=time.monotonic() - began)
    _tidy(layout, sites)
    (layout.out / RUN).write_text(run.model_dump_json(indent=1), encoding="utf-8")
    return run


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
    """Return keys that follow from the names alone; they protect nothing, as no byte leaves the process."""
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


def _clear(layout: Layout) -> None:
    """Remove what an earlier run left that was not completed."""
    (layout.out / RUN).unlink(missing_ok=True)
    for left in (layout.state.parent, layout.home, layout.model):
        shutil.rmtree(left, ignore_errors=True)


def _tidy(layout: Layout, sites: dict[str, StudySite]) -> None:
    """Remove what only the run itself needed; the models stay."""
    shutil.rmtree(layout.state.parent)
    for site in sites.values():
        for left in ("blobs", "parts", "spare-updates", "spares", "work"):
            shutil.rmtree(site.folder.state / left)
