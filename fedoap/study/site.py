"""A site of a federation in one process: its real machine, results and worker, without network or processes.

The worker does its job where the machine asks for it, and the machine hears of its end before anything
else happens. What a job leaves in the process does not reach the next one: see `quiet_process`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedoap.config import BlobFiles, Plan, SiteConfig
from fedoap.manifests import NO_KEY, TaskManifest, UploadManifest
from fedoap.protocol.events import (
    BlobStored,
    Committed,
    KeepBlobs,
    Learned,
    Leave,
    OpenPart,
    Received,
    Say,
    SiteEffect,
    SiteEvent,
    StartWork,
    WorkDone,
)
from fedoap.protocol.site import Site
from fedoap.seal import public_half
from fedoap.sitefolder import SiteFolder
from fedoap.study.figures import Share
from fedoap.study.models import BEFORE, keep_before
from fedoap.study.posts import Post, ToCoordinator, ToSite
from fedoap.study.work import Report, check_worker, quiet_process
from fedoap_node.blobs import BlobStore
from fedoap_node.files import share
from fedoap_node.job import write_job
from fedoap_node.results import Result, Results
from fedoap_node.workshop import Workshop

KEPT_BYTES = 2**27
"""Of a site's prepared cases that stay in memory from job to job; limited, as many sites share this process."""


@dataclass(slots=True)
class _Done:
    """A result on offer."""

    upload: UploadManifest
    path: Path | None


@dataclass(frozen=True, slots=True)
class Member:
    """Who a site is in its federation."""

    name: str
    federation: str
    federation_key: bytes
    signing_key: bytes
    curve_key: bytes


@dataclass(slots=True)
class StudySite:
    """Runs the machine and carries out its effects.

    `published` says where the coordinator keeps a blob.
    """

    member: Member
    config: SiteConfig
    folder: SiteFolder
    cache: Path
    published: Callable[[bytes], BlobFiles]
    report: Report
    shares: list[Share] = field(default_factory=list)
    end: str = ""
    """`finished`, or why the site left."""
    _machine: Site = field(init=False)
    _blobs: BlobStore = field(init=False)
    _results: Results = field(init=False)
    _plan: Plan | None = field(default=None, init=False)
    _done: dict[bytes, _Done] = field(default_factory=dict, init=False)
    _received: int = field(default=0, init=False)
    _workshop: Workshop = field(default_factory=lambda: Workshop(KEPT_BYTES), init=False)

    def __post_init__(self) -> None:
        check_worker(self.member.name, self.config)
        who = self.member
        self._machine = Site(
            who.federation, who.name, who.federation_key, who.signing_key, who.curve_key, software="study"
        )
        self._blobs, self._results = BlobStore(self.folder.state), Results(self.folder, durable=False)

    def handle(self, event: SiteEvent, now: float) -> list[Post]:
        """Return what is to happen because of one event."""
        return [post for effect in self._machine.handle(event, now) for post in self._do(effect)]

    def upload(self, upload: bytes) -> Path | None:
        """Return where the tensors of this upload lie; None if it has none, or is not the one on offer."""
        done = self._done.get(upload)
        return done.path if done else None

    def _do(self, effect: SiteEffect) -> list[Post]:
        name = self.member.name
        match effect:
            case Say(message, body):
                return [ToCoordinator(Received(name, name.encode(), message, body))]
            case OpenPart(part, size):
                self._fetch(part, size)
                return [ToSite(name, BlobStored(part))]
            case KeepBlobs(blobs):
                self._blobs.keep_only(blobs)
            case StartWork(task, manifest):
                return [ToSite(name, self._work(task, manifest))]
            case Committed(task, manifest):
                self._commit(manifest)
            case Learned(plan):
                self._plan = Plan.from_bytes(plan)
            case Leave(code, reason):
                self.end = "finished" if code == "finished" else reason
            case _:  # notes, and bytes that do not travel
                pass
        return []

    def _fetch(self, blob: bytes, size: int) -> None:
        there, here = self.published(blob), self._blobs.files(blob)
        share(there.manifest, here.manifest)
        share(there.blob, here.blob)
        self._received += size

    def _work(self, task: bytes, manifest: TaskManifest) -> WorkDone:
        """Do the work, unless an earlier attempt did it, and make the result out to this task."""
        result = self._results.find(manifest.work) or self._do_work(manifest)
        has_tensors = result.blob.size > 0
        seal_key = public_half(hashlib.sha256(task).digest()) if has_tensors else NO_KEY
        upload = UploadManifest(task, self.member.name, result.cases, result.metrics, result.blob, seal_key)
        self._done = {hashlib.sha256(upload.pack()).digest(): _Done(upload, result.path if has_tensors else None)}
        return WorkDone(task, upload)

    def _do_work(self, manifest: TaskManifest) -> Result:
        assert self._plan is not None, "the plan comes before the first task"
        job = write_job(
            manifest,
            site=self.member.name,
            plan=self._plan,
            config=self.config,
            blobs=self._blobs.files,
            personal=self._results.personal,
            cache=self.cache,
            output=self._results.start(manifest.work),
        )
        if job.kind == "calibrate" and job.personal is not None:
            keep_before(job.personal, self.folder.path / BEFORE)
        with quiet_process():
            self._workshop.carry_out(job, lambda progress: self.report(self.member.name, manifest.round, progress))
        return self._results.finish(manifest.work, job.output)

    def _commit(self, manifest: TaskManifest) -> None:
        (done,) = self._done.values()
        upload = done.upload
        self.shares.append(
            Share(
                self.member.name,
                manifest.kind,
                manifest.round,
                upload.cases,
                dict(upload.metrics),
                upload.blob.size,
                self._received,
            )
        )
        self._received = 0
        self._results.keep_only(manifest.work)
