"""Downloads: a part grows in `parts/`, and becomes a durable blob in `blobs/` in one step.

Beside each blob lies its packed manifest, written first: a blob that is there is whole and described.
A part has its manifest beside it too. How much of it outlasted a crash is known from its chunks' hashes, which
are compared once at the start: nothing has to be synced or noted while the download runs. Deleted files are kept
to be written over (`fedoap.spares`) while the node runs and there is room.
"""

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from fedoap.config import BlobFiles
from fedoap.errors import StorageError, TensorsError
from fedoap.identity import sync_folder
from fedoap.manifests import BlobManifest
from fedoap.spares import Spares
from fedoap.tensors import begin_write_back, right_bytes
from fedoap_node.files import remove, write_durably

LEAST_FREE_BYTES = 64 << 20
"""What a download leaves free for results and the log, however large the coordinator says its model is."""


class BlobStore:
    """The blobs of one site, and the parts that are still growing.

    Every method that writes raises `StorageError` when the disk refuses; the part is then gone.
    """

    def __init__(self, state: Path) -> None:
        self._parts, self._blobs = state / "parts", state / "blobs"
        self._open: dict[bytes, int] = {}
        for folder in (self._parts, self._blobs):
            folder.mkdir(parents=True, exist_ok=True)
        self._spares = Spares(state / "spares")

    def stored(self) -> frozenset[bytes]:
        """Return the ids of the blobs that are whole."""
        names = {path.name for path in self._blobs.iterdir()}
        return frozenset(bytes.fromhex(name) for name in names if len(name) == 64 and f"{name}.manifest" in names)

    def files(self, blob: bytes) -> BlobFiles:
        """Return where a blob and its manifest lie."""
        return BlobFiles(blob=self._blobs / blob.hex(), manifest=self._blobs / f"{blob.hex()}.manifest")

    def partly(self) -> dict[bytes, int]:
        """Return for each part that an earlier run left how many of its first bytes are right; remove all others."""
        found: dict[bytes, int] = {}
        for path in sorted(self._parts.iterdir()):
            blob = self._described(path)
            if blob is not None and (at := right_bytes(path, blob)):
                found[blob.id] = at
        self._keep_parts(found)
        return found

    def open(self, part: bytes, blob: BlobManifest, at: int = 0) -> None:
        """Make room for a part, before a byte has travelled; what lies before `at` stays."""
        if not at:
            self.drop(part)
            self._spares.take(self._part(part), blob.size)
        try:
            self._make_room(part, blob, at)
        except OSError as error:
            self.drop(part)
            if not at and self._spares.clear():
                self.open(part, blob)
                return
            raise StorageError(f"{self._parts}: no room for {blob.size} bytes: {error.strerror}") from None

    def write(self, part: bytes, at: int, data: bytes | memoryview) -> None:
        """Write a checked chunk; a part that was dropped meanwhile stays so."""
        descriptor = self._open.get(part)
        if descriptor is None:
            return
        try:
            written = os.pwrite(descriptor, data, at)
            begin_write_back(descriptor, at, at + written)
        except OSError as error:
            self.drop(part)
            raise StorageError(f"{self._parts}: cannot be written: {error.strerror}") from None
        if written != len(data):
            self.drop(part)
            raise StorageError(f"{self._parts}: only {written} of {len(data)} bytes were written")

    def finish(self, part: bytes, blob: BlobManifest) -> None:
        """Make a complete part durable under its blob's name."""
        descriptor = self._open.get(part)
        if descriptor is None:
            raise StorageError(f"{self._parts}: part {part.hex()[:12]} is gone")
        files = self.files(blob.id)
        try:
            write_durably(files.manifest, blob.pack())
            os.fdatasync(descriptor)
            self._part(part).replace(files.blob)
            sync_folder(self._blobs)
        except OSError as error:
            raise StorageError(f"{self._blobs}: cannot be written: {error.strerror}") from None
        finally:
            self.drop(part)

    def drop(self, part: bytes) -> None:
        """Forget an unfinished part."""
        descriptor = self._open.pop(part, None)
        if descriptor is not None:
            os.close(descriptor)
        remove(self._part(part))
        remove(self._part(part).with_suffix(".manifest"))

    def keep_only(self, blobs: Iterable[bytes]) -> None:
        """Delete every blob but these, and every part of others that no download is at work on."""
        needed = set(blobs)
        kept = {blob.hex() for blob in needed}
        doomed = [path for path in self._blobs.iterdir() if path.name.removesuffix(".manifest") not in kept]
        for path in doomed:
            if path.suffix == ".manifest":
                remove(path)
            else:
                self._spares.keep(path)
        if doomed:  # else a power cut may bring a name back that by then has another blob's bytes
            sync_folder(self._blobs)
        self._keep_parts(needed | self._open.keys())

    def close(self) -> None:
        """Let go of all parts and spares; what has arrived stays for the next start."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        self._spares.clear()

    def _make_room(self, part: bytes, blob: BlobManifest, at: int) -> None:
        fresh = 0 if at else os.O_CREAT  # what lies before `at` must be there
        self._open[part] = descriptor = os.open(self._part(part), os.O_RDWR | fresh, 0o600)
        if blob.size:
            os.posix_fallocate(descriptor, 0, blob.size)
        if shutil.disk_usage(self._parts).free < LEAST_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._part(part).with_suffix(".manifest").write_bytes(blob.pack())

    def _keep_parts(self, parts: Iterable[bytes]) -> None:
        kept = {part.hex() for part in parts}
        for path in self._parts.iterdir():
            if path.name.removesuffix(".manifest") not in kept:
                remove(path)

    def _described(self, path: Path) -> BlobManifest | None:
        try:
            blob = BlobManifest.unpack(path.with_suffix(".manifest").read_bytes())
        except (OSError, TensorsError):
            return None
        return blob if blob.id.hex() == path.name else None

    def _part(self, part: bytes) -> Path:
        return self._parts / part.hex()
