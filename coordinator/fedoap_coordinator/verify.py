"""Checks that all in a state folder fits together: chain, ledger, manifests, blobs, and results made anew.

Nothing is written, and no coordinator is needed or disturbed: before a file counts as missing the ledger is
asked again whether it is still kept, as a coordinator at work may have deleted it. A flipped bit is named where
it lies; only the times in `published.made` and of keys, and who is invited, are not checked.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, TypeAlias, cast

from fedoap.chain import CheckedLink, Outcome, RoundRecord, Weighed, check_chain, record_id
from fedoap.config import Plan
from fedoap.errors import ConfigError, FedoapError, TensorsError
from fedoap.identity import TASK_CONTEXT, UPLOAD_CONTEXT, is_signed
from fedoap.manifests import BlobManifest, TaskManifest, UploadManifest
from fedoap.protocol.course import Step
from fedoap_coordinator.blobcheck import Gone, check_blob, check_upload, first_difference, remake, said
from fedoap_coordinator.blobs import blob_files, exact_files
from fedoap_coordinator.evidence import (
    DamagedError,
    Evidence,
    PublishedEvidence,
    TaskEvidence,
    UpdateEvidence,
    is_kept,
    read_evidence,
)
from fedoap_coordinator.folder import LEDGER
from fedoap_coordinator.notary import Closing, Committed, describe

Finding: TypeAlias = Literal["verified", "inputs no longer kept", "open", "BROKEN"]
Upload: TypeAlias = tuple[UpdateEvidence, UploadManifest]
COLUMNS = {
    "opened": "tasks.opened",
    "closed": "tasks.closed",
    "outcome": "tasks.outcome",
    "reason": "tasks.reason",
    "result": "tasks.result",
    "exact": "published.exact",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found out about one exchange, or about the ledger as a whole."""

    title: str
    finding: Finding
    faults: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The verdict as one line."""
        return f"{self.title}: {self.finding}" + (f": {'; '.join(self.faults)}" if self.faults else "")


def verify(state: Path, federation: str, key: bytes) -> Iterator[Verdict]:
    """Yield a verdict on the ledger and one on each exchange, oldest first.

    Args:
        state: the coordinator's folder.
        federation: the federation's name.
        key: the federation's public signing key.

    Raises:
        StorageError: there is no ledger of this version.
    """
    try:
        evidence = read_evidence(state / LEDGER)
    except DamagedError as error:
        yield Verdict("ledger", "BROKEN", (str(error),))
        return
    chain = tuple(check_chain(evidence.links, federation, key))
    pairs, stray = _pair(evidence.tasks, chain)
    desk = _Desk(state, key, evidence)
    faults = tuple(desk.ledger_faults(federation, stray))
    last = record_id(evidence.links[-1].packed).hex() if evidence.links else "none"
    title = f"ledger, records {len(chain)}, last {last}"
    yield Verdict(title, "BROKEN" if faults else "verified", faults)
    for row, link in pairs:
        yield desk.judge(row, link)


@dataclass(slots=True)
class _Desk:
    """The evidence, and what was found out about blobs already."""

    state: Path
    key: bytes
    evidence: Evidence
    plan: Plan | None = field(init=False)
    _published: dict[bytes, PublishedEvidence] = field(init=False)
    _looked_at: dict[bytes, tuple[str, ...]] = field(default_factory=dict)
    _gone: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._published = {row.blob: row for row in self.evidence.published}
        try:
            self.plan = Plan.from_bytes(self.evidence.plan)
        except ConfigError:
            self.plan = None

    def ledger_faults(self, federation: str, stray: Sequence[CheckedLink]) -> Iterator[str]:
        """Yield what is wrong with rows that belong to no exchange."""
        evidence = self.evidence
        yield from (f"{LEDGER}: {line}" for line in evidence.damage)
        if evidence.federation != federation.encode():
            yield f"{LEDGER}: facts.federation is {evidence.federation!r}, not {federation}"
        for link in stray:
            yield from link.faults
            yield f"{LEDGER}: the exchange of record {link.number} is missing in tasks"
        tasks = {row.task for row in evidence.tasks}
        yield from (
            f"{LEDGER}: updates row of site {row.site}, upload {_short(row.upload)}: no exchange has its task's name"
            for row in evidence.updates
            if row.task not in tasks
        )
        for place, row in enumerate(evidence.tasks, 1):
            if row.number != place:
                yield f"{LEDGER}: tasks.number is {row.number} where {place} should stand"
        yield from (
            f"{LEDGER}: tasks row {row.number} is open, but later ones follow"
            for row in evidence.tasks[:-1]
            if not row.outcome
        )
        results = {row.result for row in evidence.tasks}
        for published in evidence.published:
            if published.blob not in results:  # made, but a crash came before the exchange was closed
                yield from self._result_faults(published.blob)

    def judge(self, row: TaskEvidence, link: CheckedLink | None) -> Verdict:
        """Return the verdict on one exchange."""
        faults = list(link.faults if link else ())
        manifest = self._task(row, faults)
        rows = self.evidence.updates_of(row.task)
        uploads = [(one, upload) for one in rows if (upload := self._upload(one, row, faults))]
        title = _title(row, manifest or (link.record if link else None))
        if link is None and row.outcome:
            faults.append(f"{LEDGER}: tasks row {row.number} is closed, but the chain has no record of it")
        if not row.outcome and any(one.counted for one in rows):
            faults.append(f"{LEDGER}: updates.counted is set, but tasks row {row.number} is open")
        if link and link.record and manifest and self.plan and len(rows) == len(uploads):
            faults += self._differences(row, manifest, uploads, link.record)
        kept = [one for one in uploads if one[0].kept and self._is_sound(*one, faults)]
        if row.result:
            faults += self._result_faults(row.result)
        finding: Finding = "verified" if row.outcome else "open"
        if not faults and row.result and manifest and self.plan:
            counted = [upload for one, upload in uploads if one.counted]
            is_here = counted == [upload for one, upload in kept if one.counted] and self._are_kept(manifest.blobs)
            finding = "verified" if is_here else "inputs no longer kept"
            try:
                faults += self._remake(row, manifest, counted, self.plan) if is_here else ()
            except Gone:
                finding = "inputs no longer kept"
        return Verdict(title, "BROKEN" if faults else finding, tuple(faults))

    def _task(self, row: TaskEvidence, faults: list[str]) -> TaskManifest | None:
        where = f"{LEDGER}: tasks row {row.number}"
        if hashlib.sha256(row.packed).digest() != row.task:
            faults.append(f"{where}: tasks.task is not the hash of tasks.packed")
        if not is_signed(self.key, row.signature, TASK_CONTEXT, row.packed):
            faults.append(f"{where}: tasks.signature is not the federation's over tasks.packed")
        try:
            manifest = TaskManifest.unpack(row.packed)
        except TensorsError as error:
            faults.append(f"{where}: tasks.packed: {error}")
            return None
        if hashlib.sha256(self.evidence.plan).digest() != manifest.plan:
            faults.append(f"{LEDGER}: facts.plan is not the plan that tasks row {row.number} names")
        return manifest

    def _upload(self, one: UpdateEvidence, row: TaskEvidence, faults: list[str]) -> UploadManifest | None:
        where = f"{LEDGER}: updates row of site {one.site}, tasks row {row.number}"
        if hashlib.sha256(one.packed).digest() != one.upload:
            faults.append(f"{where}: updates.upload is not the hash of updates.packed")
        try:
            manifest = UploadManifest.unpack(one.packed)
        except TensorsError as error:
            faults.append(f"{where}: updates.packed: {error}")
            return None
        if (manifest.site, manifest.task) != (one.site, row.task):
            faults.append(f"{where}: updates.site or task is not that of updates.packed")
        keys = [key for site, key in self.evidence.site_keys if site == manifest.site]
        if not any(is_signed(key, one.signature, UPLOAD_CONTEXT, one.packed) for key in keys):
            faults.append(f"{where}: updates.signature is of none of the {len(keys)} keys that site_keys has for it")
        return manifest

    def _differences(
        self, row: TaskEvidence, manifest: TaskManifest, uploads: Sequence[Upload], record: RoundRecord
    ) -> Iterator[str]:
        """Yield where a record written anew from the ledger's rows is another than the signed one."""
        assert self.plan is not None
        published = self._published.get(row.result)
        closing = Closing(
            task=row.task,
            manifest=manifest,
            opened=row.opened,
            closed=row.closed,
            outcome=cast(Outcome, row.outcome),
            reason=row.reason,
            uploads=tuple(Committed(one.upload, upload, one.stored, one.counted) for one, upload in uploads),
            result=row.result,
            exact=hashlib.sha256(published.exact).digest() if published and published.exact else b"",
        )
        anew = replace(describe(closing, self.plan, record.software, record.number, record.previous), rule=record.rule)
        for name in (one.name for one in fields(RoundRecord)):
            mine, signed = getattr(anew, name), getattr(record, name)
            if mine != signed:
                column = COLUMNS.get(name, "updates" if name in ("counted", "left_out") else "tasks.packed")
                what = _uploads_differ(name, mine, signed) if isinstance(mine, tuple) else f"is {_show(mine)}"
                yield f"{LEDGER}: tasks row {row.number}: {column} {what}, but record {record.number} says " + (
                    "otherwise" if isinstance(signed, tuple) else _show(signed)
                )

    def _is_sound(self, one: UpdateEvidence, upload: UploadManifest, faults: list[str]) -> bool:
        try:
            found = list(check_upload(self.state, upload))
        except Gone as gone:
            if is_kept(self.state / LEDGER, "updates", one.upload):
                faults.append(f"{gone}: is missing, but the ledger keeps the upload of site {one.site}")
            return False
        faults += [f"upload of site {one.site}: {fault}" for fault in found]
        return not found

    def _result_faults(self, blob: bytes) -> tuple[str, ...]:
        if blob not in self._looked_at:
            self._looked_at[blob] = tuple(self._look_at_result(blob))
        return self._looked_at[blob]

    def _look_at_result(self, blob: bytes) -> Iterator[str]:
        row = self._published.get(blob)
        if row is None:
            yield f"{LEDGER}: result {_short(blob)} is missing in published"
            return
        if hashlib.sha256(row.manifest).digest() != blob:
            yield f"{LEDGER}: published row {_short(blob)}: published.blob is not the hash of published.manifest"
            return
        try:
            yield from self._look_at_files(row)
        except TensorsError as error:
            yield f"{LEDGER}: published row {_short(blob)}: {error}"
        except Gone as gone:
            self._gone.add(blob)
            if is_kept(self.state / LEDGER, "published", blob):
                yield f"{gone}: is missing, but the ledger keeps it"

    def _look_at_files(self, row: PublishedEvidence) -> Iterator[str]:
        manifest = BlobManifest.unpack(row.manifest)
        exact = BlobManifest.unpack(row.exact) if row.exact else None
        if row.kept:
            yield from check_blob(blob_files(self.state, row.blob), manifest)
        if row.kept and exact:
            yield from check_blob(exact_files(self.state, row.blob), exact)

    def _are_kept(self, blobs: Iterable[BlobManifest]) -> bool:
        """Return whether published blobs are here to make something from; `_remake` tells of damaged ones."""
        rows = [self._published.get(blob.id) for blob in blobs]
        for row in rows:
            if row is not None:
                self._result_faults(row.blob)
        return all(row is not None and row.kept and row.blob not in self._gone for row in rows)

    def _remake(
        self, row: TaskEvidence, manifest: TaskManifest, uploads: Sequence[UploadManifest], plan: Plan
    ) -> Iterator[str]:
        """Yield a fault unless the uploads make the published result, bit for bit.

        Raises:
            Gone: a coordinator at work has dropped an input in the meantime.
        """
        damage = [fault for blob in manifest.blobs for fault in self._result_faults(blob.id)]
        if damage:
            yield f"cannot be made anew: {damage[0]}"
            return
        published = self._published[row.result]
        try:
            made, exact = remake(manifest, uploads, plan, self.state)
        except (FedoapError, OSError) as error:
            now = {one.upload: one for one in read_evidence(self.state / LEDGER).updates_of(row.task)}
            kept = [is_kept(self.state / LEDGER, "published", blob.id) for blob in manifest.blobs]
            if not all([*kept, *(one.kept for one in now.values() if one.counted)]):
                raise Gone(row.task.hex()) from None
            yield f"cannot be made anew: {said(error)}"
            return
        for new, old, what in ((made, published.manifest, ""), (exact, published.exact, "original of ")):
            if (new.pack() if new else b"") != old:
                where = first_difference(new, BlobManifest.unpack(old)) if new and old else "one of them is missing"
                yield f"its {len(uploads)} uploads do not make the {what}result {_short(row.result)}: {where}"


def _pair(
    tasks: Sequence[TaskEvidence], chain: Sequence[CheckedLink]
) -> tuple[list[tuple[TaskEvidence, CheckedLink | None]], list[CheckedLink]]:
    """Return each exchange with its record, and the records left over: by task, else by their order."""
    by_task = {link.record.task: link for link in chain if link.record}
    found = {row.number: by_task.get(row.task) or by_task.get(hashlib.sha256(row.packed).digest()) for row in tasks}
    taken = Counter(link.number for link in found.values() if link)
    left = [link for link in chain if not taken[link.number]]
    orphans = [row.number for row in tasks if found[row.number] is None and row.outcome]
    if len(orphans) == len(left):
        found |= dict(zip(orphans, left, strict=True))
        left = []
    return [(row, found[row.number]) for row in tasks], left


def _title(row: TaskEvidence, what: TaskManifest | RoundRecord | None) -> str:
    return f"{Step(what.kind, what.round)}, attempt {what.attempt}" if what else f"tasks row {row.number}"


def _uploads_differ(name: str, mine: tuple[Weighed, ...], signed: tuple[Weighed, ...]) -> str:
    sites = sorted({one.site for one in set(mine) ^ set(signed)})
    return f"of {', '.join(sites)} ({'counted' if name == 'counted' else 'left out'}) differ"


def _show(value: object) -> str:
    if isinstance(value, bytes):
        return _short(value) if value else "empty"
    return "empty" if value == "" or (isinstance(value, float) and math.isnan(value)) else repr(value)


def _short(name: bytes) -> str:
    return name.hex()[:16]
