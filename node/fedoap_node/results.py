"""Results of finished work, the personal state they leave, and the model that the site has now.

A worker writes into a folder of its own under `work/`. Once its result is complete and durable, one
rename gives the folder the name of its work, and a second makes its `personal/` the newest
generation under `state/personal/`. So a crash at any point leaves the personal state of the last
finished job or of this one, whole, and `recover` does what was left undone.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fedoap.config import BlobFiles, ModelRecord
from fedoap.errors import StorageError, TensorsError, TrainingError
from fedoap.identity import sync_folder, write_private
from fedoap.manifests import BlobManifest
from fedoap.packing import pack_blob
from fedoap.params import PERSONAL_PREFIX
from fedoap.seal import KEY_BYTES
from fedoap.sitefolder import SiteFolder
from fedoap.spares import Spares
from fedoap.tensors import open_to_overwrite
from fedoap.toml import first_line
from fedoap_node.files import remove, share, sync_tree, write_durably
from fedoap_node.job import JOB, PERSONAL, RESULT, UPDATE_BLOB, UPDATE_MANIFEST, Job, JobResult

PACKED_BLOB, PACKED_MANIFEST = "packed.blob", "packed.manifest"
"""What travels in the update's place where the plan has updates packed."""
SEAL = "seal.key"
"""A task's name and the secret that its upload is sealed with."""
ORDER = "order"
"""Holds a number that only grows and tells which result was finished last; a clock may be set back."""
WORK_LETTERS = 64
"""Of a work's name in hexadecimal digits: the folder of a worker that is still busy has more."""
GONE = "gone-"
"""Begins the names of results on their way off the disk."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished job has to send."""

    cases: int
    metrics: tuple[tuple[str, float], ...]
    blob: BlobManifest
    path: Path
    """File of the blob's bytes; there is none if the blob is empty."""


class Results:
    """The work of one site that is done, by `TaskManifest.work`.

    Without `durable` nothing waits for the disk, which suits a run that a power cut would begin anew anyway.
    """

    def __init__(self, folder: SiteFolder, *, durable: bool = True) -> None:
        self._durable = durable
        self._work, self._personal = folder.state / "work", folder.state / PERSONAL
        self._model, self._record = folder.model, folder.model_record
        for place in (self._work, self._personal, self._model):
            place.mkdir(parents=True, exist_ok=True)
        self._spares = Spares(folder.state / "spare-updates", 1)

    @property
    def personal(self) -> Path | None:
        """Folder of the personal state that the last finished job left, if any did."""
        generations = self._generations()
        return generations[-1] if generations else None

    def start(self, work: bytes, size: int = 0, *, packs: bool = False) -> Path:
        """Return a fresh folder for a worker's output, with room for an update of this size and for its packed form.

        The room is taken now, an old update's if there is one: without it the work would be done in vain.
        Of the results that are kept only the last stays: those of a site that is always late are never committed.

        Raises:
            StorageError: there is no room.
        """
        self._drop_all(sorted(self._kept(), key=_order)[:-1])
        output = Path(tempfile.mkdtemp(prefix=f"{work.hex()}-", dir=self._work))
        self._spares.take(output / UPDATE_BLOB, size)
        try:
            for name in (UPDATE_BLOB, PACKED_BLOB) if packs else (UPDATE_BLOB,):
                self._take_room(output / name, size)
        except OSError as error:
            remove(output)
            raise StorageError(f"{output}: no room for an update of {size} bytes: {error.strerror}") from None
        return output

    def _take_room(self, path: Path, size: int) -> None:
        if not size:
            return
        with open_to_overwrite(path) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError:
                if not self._spares.clear():
                    raise
                os.posix_fallocate(file.fileno(), 0, size)

    def find(self, work: bytes) -> Result | None:
        """Return the kept result of this work, if there is one."""
        folder = self._work / work.hex()
        return _read(folder) if folder.is_dir() else None

    def finish(self, work: bytes, output: Path) -> Result:
        """Keep what a worker left, promote its personal state, and return the result.

        Raises:
            TrainingError: the result is missing, does not fit its manifest or names personal tensors.
            TensorsError: it cannot be packed: its tensors are not the model's, or not finite.
            OSError: the disk refuses.
        """
        _read(output)
        _pack(output)
        (output / ORDER).write_text(str(1 + max(map(_order, self._work.iterdir()), default=0)), encoding="utf-8")
        if self._durable:
            sync_tree(output)
        folder = self._work / work.hex()
        self.drop(work)
        output.rename(folder)
        self._sync(self._work)
        self._settle(folder)
        return _read(folder)

    def seal_secret(self, work: bytes, task: bytes) -> bytes:
        """Return the secret that this work's upload for a task is sealed with; it is durable, and the same each time.

        So a node that was restarted offers the very same upload, and goes on with it.
        """
        path = self._work / work.hex() / SEAL
        kept = path.read_bytes() if path.is_file() else b""
        if len(kept) == len(task) + KEY_BYTES and kept.startswith(task):
            return kept[len(task) :]
        secret = os.urandom(KEY_BYTES)
        write_private(path, task + secret)
        return secret

    def recover(self) -> None:
        """Remove what crashed workers left, or another version wrote, and do what a crash of ours left undone."""
        for path in self._work.iterdir():
            if len(path.name) != WORK_LETTERS or not (path / RESULT).is_file() or _job(path) is None:
                remove(path)
        for folder in sorted(self._work.iterdir(), key=_order):
            self._settle(folder)

    def keep_only(self, work: bytes) -> None:
        """Delete every kept result but this work's; the next worker writes over an update that nobody reads."""
        self._drop_all([path for path in self._work.iterdir() if path.name != work.hex()])

    def drop(self, work: bytes) -> None:
        """Delete this work's result, if there is one."""
        if (folder := self._work / work.hex()).is_dir():
            self._drop(folder)

    def close(self) -> None:
        """Delete what only this process can use."""
        self._spares.clear()

    def _drop_all(self, folders: list[Path]) -> None:
        for folder in folders:
            self._drop(folder)
        if folders:  # else a power cut may bring a result back that by then has another's bytes
            sync_folder(self._work)

    def _drop(self, folder: Path) -> None:
        """Take a folder's name away, so that a crash leaves no result of which half is there, then delete it."""
        gone = self._work / f"{GONE}{folder.name}"
        remove(gone)
        folder.rename(gone)
        if (gone / UPDATE_BLOB).is_file():
            self._spares.keep(gone / UPDATE_BLOB)
        remove(gone)

    def _settle(self, folder: Path) -> None:
        left = folder / PERSONAL
        if left.is_dir():
            newest = self.personal
            left.rename(self._personal / f"{int(newest.name) + 1 if newest else 1:08d}")
            self._sync(self._personal)
        job = _job(folder)
        if job is not None and job.kind in ("train", "calibrate"):
            self._write_record(job, folder)
            for old in self._generations()[:-1]:
                remove(old)

    def _write_record(self, job: Job, folder: Path) -> None:
        """Write `model.json`: what this job trained, and the personal state that it left with it."""
        update = BlobFiles(blob=folder / UPDATE_BLOB, manifest=folder / UPDATE_MANIFEST)
        shared = update if job.kind == "train" and update.manifest.is_file() else job.model
        if shared is None or not all(self._is_here(files) for files in (shared, job.bank) if files):
            return
        linked = self._link(shared)
        bank = self._link(job.bank) if job.bank else None
        record = ModelRecord(plan=job.plan, round=job.round, shared=linked, bank=bank, personal=self.personal)
        self._write(self._record, record.model_dump_json(indent=1).encode())
        used = {path for files in (linked, bank) if files for path in (files.blob, files.manifest)}
        for path in self._model.iterdir():
            if path not in used | {self._record}:
                remove(path)

    def _sync(self, folder: Path) -> None:
        if self._durable:
            sync_folder(folder)

    def _write(self, path: Path, data: bytes) -> None:
        if self._durable:
            write_durably(path, data)
        else:
            path.write_bytes(data)

    def _is_here(self, files: BlobFiles) -> bool:
        return files.blob.is_file() and files.manifest.is_file()

    def _link(self, files: BlobFiles) -> BlobFiles:
        name = BlobManifest.unpack(files.manifest.read_bytes()).id.hex()
        linked = BlobFiles(blob=self._model / name, manifest=self._model / f"{name}.manifest")
        share(files.blob, linked.blob)
        share(files.manifest, linked.manifest)
        return linked

    def _kept(self) -> list[Path]:
        return [path for path in self._work.iterdir() if len(path.name) == WORK_LETTERS]

    def _generations(self) -> list[Path]:
        return sorted(path for path in self._personal.iterdir() if path.name.isdecimal())


def _order(folder: Path) -> int:
    try:
        return int((folder / ORDER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def _job(folder: Path) -> Job | None:
    """Return what a worker's output is of; nothing where another version wrote it."""
    try:
        return Job.model_validate_json((folder / JOB).read_bytes())
    except ValidationError:
        return None


def _pack(folder: Path) -> None:
    """Pack the update where the plan has it so."""
    job, table = _job(folder), folder / UPDATE_MANIFEST
    if job is None or job.kind != "train" or job.model is None or job.plan.wire.updates == "plain":
        return
    if table.is_file():
        update, base = (BlobManifest.unpack(path.read_bytes()) for path in (table, job.model.manifest))
        packed = pack_blob(folder / UPDATE_BLOB, update, job.model.blob, base, folder / PACKED_BLOB)
        (folder / PACKED_MANIFEST).write_bytes(packed.pack())


def _read(folder: Path) -> Result:
    try:
        said = JobResult.model_validate_json((folder / RESULT).read_bytes())
        is_packed = (folder / PACKED_MANIFEST).is_file()
        name, table = (PACKED_BLOB, PACKED_MANIFEST) if is_packed else (UPDATE_BLOB, UPDATE_MANIFEST)
        has_tensors = (folder / table).is_file()
        blob = BlobManifest.unpack((folder / table).read_bytes()) if has_tensors else BlobManifest((), b"")
        size = (folder / name).stat().st_size if blob.size else 0
    except ValidationError as error:
        raise TrainingError(f"worker: left no usable result: {RESULT}: {first_line(error, JobResult)}") from None
    except (OSError, TensorsError) as error:
        raise TrainingError(f"worker: left no usable result: {error}") from None
    if size != blob.size:
        raise TrainingError(f"worker: {name} has {size} bytes, but its manifest says {blob.size}")
    personal = [spec.name for spec in blob.tensors if spec.name.startswith(PERSONAL_PREFIX)]
    if personal:
        raise TrainingError(f"worker: update names {personal[0]}, but personal tensors never leave a site")
    return Result(said.cases, tuple(sorted(said.metrics.items())), blob, folder / name)
