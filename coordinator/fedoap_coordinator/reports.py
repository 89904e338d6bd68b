"""What the ledger has to tell: sites, state, results, the model for use elsewhere."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

from fedoap.blobfile import without
from fedoap.config import BlobFiles, FederationConfig, ModelRecord
from fedoap.errors import StorageError
from fedoap.identity import fingerprint
from fedoap.manifests import BlobManifest, TaskKind
from fedoap.params import CONTROL_PREFIX
from fedoap.protocol.course import Step, place
from fedoap.protocol.history import BANK_KINDS, MODEL_KINDS
from fedoap.tensors import right_bytes
from fedoap_coordinator.blobs import blob_files
from fedoap_coordinator.damage import MENDING
from fedoap_coordinator.ledger import Ledger
from fedoap_coordinator.rows import TaskRow

STATUS = "status.json"
NONE_YET = "no exchange was opened yet"


class SiteFigures(TypedDict):
    """What one site gave to one exchange."""

    cases: int
    bytes: int
    metrics: dict[str, float]


class ExchangeFigures(TypedDict):
    """One exchange; `outcome` and `seconds` are null while it is open."""

    kind: TaskKind
    round: int
    attempt: int
    outcome: str | None
    seconds: float | None
    sites: dict[str, SiteFigures]


class Results(TypedDict):
    """All exchanges of a federation."""

    federation: str
    finished: bool
    exchanges: list[ExchangeFigures]


def results(config: FederationConfig, ledger: Ledger) -> Results:
    """Return every exchange in the order in which it was opened."""
    tasks = ledger.tasks()
    finished = any(row.outcome == "done" and row.manifest.kind == "calibrate" for row in tasks)
    return {
        "federation": config.federation,
        "finished": finished,
        "exchanges": [_exchange(ledger, row) for row in tasks],
    }


def result_lines(run: Results) -> Iterator[str]:
    """Yield the results as text, a line for each exchange and one for each site in it."""
    if not run["exchanges"]:
        yield NONE_YET
    for one in run["exchanges"]:
        seconds = "" if one["seconds"] is None else f" in {one['seconds']:.1f} s"
        what = Step(one["kind"], one["round"])
        yield f"{what}, attempt {one['attempt']}: {one['outcome'] or 'open'}{seconds}"
        for site, figures in one["sites"].items():
            metrics = "  ".join(f"{name} {value:.4g}" for name, value in sorted(figures["metrics"].items()))
            yield f"  {site}  cases {figures['cases']}  bytes {figures['bytes']}  {metrics}".rstrip()


def site_lines(config: FederationConfig, ledger: Ledger, now: float) -> Iterator[str]:
    """Yield a line for each site: its keys' fingerprint, or what became of its invitation."""
    roster, invites = ledger.roster(), ledger.invites()
    for name in [*config.sites, *(one.name for one in roster.members if one.name not in config.sites)]:
        member = roster.find(name)
        open_ones = [one for one in invites if one.site == name and not (one.used or one.withdrawn)]
        if member and member.revoked:
            line = "revoked"
        elif member:
            line = f"enrolled, key {fingerprint(member.signing_key)}"
        else:
            line = "not enrolled"
        for one in open_ones:
            hours = (one.expires - now) / 3600
            line += f", invitation open for {hours:.1f} hours" if hours > 0 else ", invitation expired"
        yield f"  {name}: {line}" + ("" if name in config.sites else " (not in the configuration)")


def status_lines(config: FederationConfig, ledger: Ledger, pid: int | None) -> Iterator[str]:
    """Yield how the federation stands, as the running coordinator last wrote it or as the ledger has it."""
    state = config.coordinator.state
    yield f"coordinator runs as process {pid}" if pid else f"no coordinator runs on {state}"
    tasks = ledger.tasks()
    if not tasks:
        yield NONE_YET
    for row in tasks[-1:]:
        here = [update.site for update in ledger.updates(row.task)]
        missing = [name for name in row.manifest.cohort if name not in here]
        since = datetime.fromtimestamp(row.closed or row.opened, UTC).isoformat(timespec="seconds")
        what = f"{Step(row.manifest.kind, row.manifest.round)}, attempt {row.manifest.attempt}"
        yield f"{what}: {row.outcome or 'open'} since {since}" + ("" if row.outcome else _missing(missing))
    if pid:
        yield from _live(state / STATUS)


def export(config: FederationConfig, ledger: Ledger, folder: Path) -> ModelRecord:
    """Copy the newest shared model and bank to a folder, write its `model.json` last, and return that.

    Raises:
        StorageError: there is no model yet, a blob cannot be read, or the folder cannot be written.
    """
    tasks, state = ledger.tasks(), config.coordinator.state
    models = [row for row in tasks if row.result and row.manifest.kind in MODEL_KINDS]
    banks = [row for row in tasks if row.result and row.manifest.kind in BANK_KINDS]
    if not models:
        raise StorageError(f"{state}: no round is done, so there is no model to export")
    shared, bank = _result(state, models[-1]), _result(state, banks[-1]) if banks else None
    return write_model(folder, ModelRecord(plan=config.plan, round=models[-1].manifest.round, shared=shared, bank=bank))


def write_model(folder: Path, model: ModelRecord) -> ModelRecord:
    """Copy a shared model and its bank to a folder, write its `model.json` last, and return that.

    Raises:
        StorageError: a blob cannot be read, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shared = _copy(model.shared, folder / "model.blob")
        bank = _copy(model.bank, folder / "bank.blob") if model.bank else None
        record = model.model_copy(update={"shared": shared, "bank": bank})
        draft = folder / ".model.json"
        draft.write_text(record.model_dump_json(indent=1))
        draft.replace(folder / "model.json")
    except OSError as error:
        raise StorageError(f"{error.filename}: the system refused: {error.strerror}; no model is exported") from None
    return record


def _exchange(ledger: Ledger, row: TaskRow) -> ExchangeFigures:
    updates = [one for one in ledger.updates(row.task) if one.counted or row.outcome != "done"]
    return {
        "kind": row.manifest.kind,
        "round": row.manifest.round,
        "attempt": row.manifest.attempt,
        "outcome": row.outcome,
        "seconds": None if row.closed is None else round(row.closed - row.opened, 3),
        "sites": {
            one.site: {
                "cases": one.manifest.cases,
                "bytes": one.manifest.blob.size,
                "metrics": dict(one.manifest.metrics),
            }
            for one in updates
        },
    }


def _missing(names: list[str]) -> str:
    return f", waiting for {', '.join(names)}" if names else ", all results are here"


def _live(path: Path) -> Iterator[str]:
    try:
        view = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    status = view["status"]
    yield f"{place(status['kind'], status['round'], status['rounds'])}: {status['reason'] or status['state']}"
    for site in status["sites"]:
        seconds = site["heard_seconds"]
        heard = "not heard since the coordinator started" if seconds is None else f"heard {seconds:.0f} s ago"
        stage = f", {site['stage']} {site['step']}/{site['steps']}" if site["steps"] else ""
        software = f", {site['software']}" if site["software"] else ""
        moved = [view[way].get(site["name"], 0) / 1e6 for way in ("received", "sent")]
        in_and_out = f", {moved[0]:.1f} MB in, {moved[1]:.1f} MB out" if any(moved) else ""
        yield f"  {site['name']}: {site['state']}, {heard}{stage}{in_and_out}{software}"


def _result(state: Path, row: TaskRow) -> BlobFiles:
    assert row.result is not None, "only exchanges with a result are asked for"
    return blob_files(state, row.result)


def _copy(files: BlobFiles, target: Path) -> BlobFiles:
    """Copy a blob, but for what only the sites' training needs.

    Raises:
        StorageError: it is not what it was when it was published.
    """
    manifest, source = target.with_suffix(".manifest"), BlobManifest.unpack(files.manifest.read_bytes())
    if (at := right_bytes(files.blob, source)) < source.size:
        raise StorageError(f"{files.blob}: is damaged from byte {at} on; {MENDING}; no model is exported")
    manifest.write_bytes(without(files.blob, source, CONTROL_PREFIX, target).pack())
    return BlobFiles(blob=target.absolute(), manifest=manifest.absolute())
