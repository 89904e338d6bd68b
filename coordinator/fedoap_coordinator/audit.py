"""Every blob that entered or left, by site: for the people who have to answer for it.

What entered is told by the ledger's uploads, what left by its downloads, what was turned away by the log,
as far back as that reaches. Nothing is written, and a coordinator at work is not disturbed.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypedDict

from fedoap.config import FederationConfig
from fedoap.errors import ConfigError, TensorsError
from fedoap.manifests import BlobManifest, TaskManifest, UploadManifest
from fedoap_coordinator.damage import MENDING
from fedoap_coordinator.evidence import DamagedError, Evidence, read_evidence
from fedoap_coordinator.folder import LEDGER
from fedoap_coordinator.rows import RowError

LOG = "log.jsonl"
RESULT_CODES: Final = frozenset(
    {
        "schema",
        "not_finite",
        "cases",
        "bad_signature",
        "malformed",
        "corrupt",
        "no_space",
        "duplicate",
        "late",
        "foreign",
    }
)
"""Refusals that are about a result, not about a connection."""


class Entered(TypedDict):
    """An upload that was committed; `counted` is null while its exchange is open."""

    time: str
    kind: str
    round: int
    attempt: int
    upload: str
    blob: str
    bytes: int
    cases: int
    counted: bool | None
    kept: bool


class Refused(TypedDict):
    """A result that was turned away; `count` is how often, so far, since the coordinator was started."""

    time: str
    code: str
    reason: str
    count: int


class Left(TypedDict):
    """A published blob that a site fetched; `sent` counts what it asked for again, too."""

    blob: str
    what: str
    bytes: int
    sent: int
    first: str
    last: str


class SiteAudit(TypedDict):
    """What entered from one site, was turned away, and left for it, each in the order of time."""

    entered: list[Entered]
    refused: list[Refused]
    left: list[Left]


def audit(config: FederationConfig, only: str | None = None) -> dict[str, SiteAudit]:
    """Return what entered and left, for each site or for one.

    Raises:
        ConfigError: the one is no site of this federation and never was.
        StorageError: there is no ledger of this version.
        DamagedError: rows of the ledger make no sense.
    """
    state = config.coordinator.state
    evidence = read_evidence(state / LEDGER)
    earlier = [*(row.site for row in evidence.updates), *(row.site for row in evidence.downloads)]
    names = [*config.sites, *sorted(set(earlier) - set(config.sites))]
    if only is not None and only not in names:
        raise ConfigError(f"{only}: is no site of federation {config.federation}; these are: {', '.join(names)}")
    refused = _refused(state / LOG)
    try:
        return {
            site: {
                "entered": sorted(_entered(evidence, site), key=lambda one: one["time"]),
                "refused": refused.get(site, []),
                "left": list(_left(evidence, site)),
            }
            for site in names
            if only in (None, site)
        }
    except (TensorsError, RowError) as error:
        raise DamagedError(f"{state / LEDGER}: ledger is damaged: {error}; {MENDING}") from None


def audit_lines(found: dict[str, SiteAudit]) -> Iterator[str]:
    """Yield the audit as text, a line for each blob."""
    for site, one in found.items():
        entered, left = one["entered"], one["left"]
        total = sum(upload["bytes"] for upload in entered), sum(blob["sent"] for blob in left)
        yield (
            f"{site}: {len(entered)} uploads with {total[0]} bytes entered, "
            f"{len(left)} blobs with {total[1]} bytes left, {len(one['refused'])} refusals"
        )
        for upload in entered:
            counted = {True: "counted", False: "not counted", None: "open"}[upload["counted"]]
            what = f"{upload['kind']} round {upload['round']}, attempt {upload['attempt']}"
            kept = ", kept" if upload["kept"] else ""
            yield f"  in   {upload['time']}  {what}  {upload['bytes']} bytes  {upload['upload']}  {counted}{kept}"
        for refusal in one["refused"]:
            yield f"  not  {refusal['time']}  {refusal['code']}: {refusal['reason']} (time {refusal['count']})"
        for blob in left:
            span = f"{blob['first']} to {blob['last']}"
            yield f"  out  {span}  {blob['what']}  {blob['sent']} of {blob['bytes']} bytes  {blob['blob']}"


def _entered(evidence: Evidence, site: str) -> Iterator[Entered]:
    tasks = {row.task: row for row in evidence.tasks}
    for row in evidence.updates:
        if row.site == site:
            opened = tasks.get(row.task)
            if opened is None:
                raise RowError(f"updates names task {row.task.hex()[:16]}, which tasks lacks")
            task, upload = TaskManifest.unpack(opened.packed), UploadManifest.unpack(row.packed)
            yield {
                "time": _time(row.stored),
                "kind": task.kind,
                "round": task.round,
                "attempt": task.attempt,
                "upload": row.upload.hex(),
                "blob": upload.blob.id.hex(),
                "bytes": upload.blob.size,
                "cases": upload.cases,
                "counted": row.counted if opened.outcome else None,
                "kept": row.kept,
            }


def _left(evidence: Evidence, site: str) -> Iterator[Left]:
    sizes = {row.blob: BlobManifest.unpack(row.manifest).size for row in evidence.published}
    made = {row.result: TaskManifest.unpack(row.packed) for row in reversed(evidence.tasks) if row.result}
    for row in evidence.downloads:
        if row.site == site:
            task = made.get(row.blob)
            yield {
                "blob": row.blob.hex(),
                "what": f"result of {task.kind} round {task.round}" if task else "unknown",
                "bytes": sizes.get(row.blob, 0),
                "sent": row.bytes,
                "first": _time(row.first),
                "last": _time(row.last),
            }


def _refused(log: Path) -> dict[str, list[Refused]]:
    found: dict[str, list[Refused]] = {}
    if not log.exists():
        return found
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            match _parsed(line):
                case {
                    "event": "refused",
                    "time": str(time),
                    "site": str(site),
                    "code": str(code),
                    "reason": str(reason),
                    "count": int(count),
                } if code in RESULT_CODES:
                    row: Refused = {"time": time, "code": code, "reason": reason, "count": count}
                    found.setdefault(site, []).append(row)
    return found


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:  # the last line of a coordinator that was killed
        return None


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        raise RowError(f"{seconds} is no time") from None
