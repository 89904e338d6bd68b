"""Downloads: a part grows in `parts/`, and becomes a durable blob in `blobs/` in one step.

Beside each blob lies its packed manifest, written first: a blob that is there is whole and described.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from fedoap.config import BlobFiles
from fedoap.errors import StorageError
from fedoap.identity import sync_folder
from fedoap.tensors import BlobManifest
from fedoap_node.files import remove, write_durably

WRITE_BACK_BYTES = 8 << 20


class BlobStore:
    """The blobs of one site, and the parts that are still growing.

    Every method that writes raises `StorageError` when the disk refuses; the part is then gone.
    """

    def __init__(self, state: Path) -> None:
        self._parts, self._blobs = state / "parts", state / "blobs"
        self._open: dict[bytes, int] = {}
        remove(self._parts)  # a download that a crash cut short starts anew
        for folder in (self._parts, self._blobs):
            folder.mkdir(parents=True, exist_ok=True)

    def stored(self) -> frozenset[bytes]:
        """Return the ids of the blobs that are whole."""
        names = {path.name for path in self._blobs.iterdir()}
        return frozenset(bytes.fromhex(name) for name in names if len(name) == 64 and f"{name}.manifest" in names)

    def files(self, blob: bytes) -> BlobFiles:
        """Return where a blob and its manifest lie."""
        return BlobFiles(blob=self._blobs / blob.hex(), manifest=self._blobs / f"{blob.hex()}.manifest")

    def open(self, part: bytes, size: int) -> None:
        """Make room for a part, so that a full disk refuses it before a byte has travelled."""
        self.drop(part)
        try:
            descriptor = os.open(self._part(part), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            self._open[part] = descriptor
            if size:
                os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            self.drop(part)
            raise StorageError(f"{self._parts}: no room for {size} bytes: {error.strerror}") from None

    def write(self, part: bytes, at: int, data: bytes | memoryview) -> None:
        """Write a checked chunk; a part that was dropped meanwhile stays so."""
        descriptor = self._open.get(part)
        if descriptor is None:
            return
        try:
            written = os.pwrite(descriptor, data, at)
            if (
                at + written
            ) % WRITE_BACK_BYTES == 0:  # so that little is left for the fdatasync, which holds the loop up
                os.posix_fadvise(descriptor, at + written - WRITE_BACK_BYTES, WRITE_BACK_BYTES, os.POSIX_FADV_DONTNEED)
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

    def keep_only(self, blobs: Iterable[bytes]) -> None:
        """Delete every blob but these."""
        kept = {blob.hex() for blob in blobs}
        for path in self._blobs.iterdir():
            if path.name.removesuffix(".manifest") not in kept:
                remove(path)

    def close(self) -> None:
        """Forget all parts."""
        for part in list(self._open):
            self.drop(part)

    def _part(self, part: bytes) -> Path:
        return self._parts / part.hex()
