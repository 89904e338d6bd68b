"""Sealed uploads: what a site sends can be read with the key of its exchange and by nobody without it.

The coordinator makes an X25519 key pair for each exchange and signs the public half with the task; a site
makes one for each upload and signs the public half with the upload. Both derive one AES-256-GCM key by
HKDF-SHA256 from what the two pairs agree on, bound to task, site, both public keys and the upload's name.
A chunk's nonce is its number and its associated data the upload and the offset, so a chunk opens only
where it belongs. The name of an upload fixes every byte of it, so no nonce ever meets two contents.

On disk a sealed upload is its sealed chunks, one after the other: `TAG_BYTES` more for each chunk. Once
the exchange's secret is deleted nobody can open it, not even with the disk and the federation's keys in hand.

    file = SealedFile(path, manifest, secret)
    for chunk in file.chunks():  # plain, in order, each compared with its hash
    data = file.read(at, size)   # plain bytes from anywhere
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedoap.errors import SealError, UpdateError
from fedoap.manifests import BlobManifest, UploadManifest

SEAL_CONTEXT = b"fedoap/2 seal"
TAG_BYTES = 16
KEY_BYTES = 32
_NONCE_BYTES = 12


def public_half(secret: bytes) -> bytes:
    """Return the public key (32 bytes) of an X25519 secret."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def sealed_at(blob: BlobManifest, at: int) -> int:
    """Return where the chunk at byte `at` of a blob starts once it is sealed; for its size, the sealed size."""
    return at + TAG_BYTES * -(-at // blob.chunk_bytes)


class Seal:
    """The seal of one upload, the same at both ends."""

    __slots__ = ("_aead", "_blob", "_upload")

    def __init__(self, upload: UploadManifest, secret: bytes, peer: bytes, exchange: bytes) -> None:
        name = hashlib.sha256(upload.pack()).digest()
        info = msgpack.packb([SEAL_CONTEXT, upload.task, upload.site, upload.seal_key, exchange, name])
        try:
            agreed = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError:
            raise SealError(f"upload of site {upload.site}: its key and its exchange's agree on nothing") from None
        self._aead = AESGCM(HKDF(SHA256(), KEY_BYTES, None, info).derive(agreed))
        self._upload, self._blob = name, upload.blob

    @classmethod
    def of_site(cls, upload: UploadManifest, secret: bytes, exchange: bytes) -> Self:
        """Return the seal at the site, from the upload's secret and the exchange's public key.

        Raises:
            SealError: the exchange's public key is no key.
        """
        return cls(upload, secret, exchange, exchange)

    @classmethod
    def of_exchange(cls, upload: UploadManifest, secret: bytes) -> Self:
        """Return the seal at the coordinator, from the exchange's secret and the upload's public key.

        Raises:
            SealError: the upload's public key is no key.
        """
        return cls(upload, secret, upload.seal_key, public_half(secret))

    def close(self, at: int, plain: bytes | memoryview) -> bytes:
        """Return the sealed chunk that starts at byte `at` of the blob."""
        return self._aead.encrypt(*self._place(at, plain))

    def open(self, at: int, sealed: bytes | memoryview) -> bytes:
        """Return the plain chunk that starts at byte `at` of the blob.

        Raises:
            SealError: it was sealed for another place, upload or exchange, or changed on its way.
        """
        try:
            return self._aead.decrypt(*self._place(at, sealed))
        except InvalidTag:
            raise SealError(f"chunk at byte {at} does not open: it was not sealed for this place, or changed") from None

    def _place(self, at: int, data: bytes | memoryview) -> tuple[bytes, bytes | memoryview, bytes]:
        nonce = (at // self._blob.chunk_bytes).to_bytes(_NONCE_BYTES, "big")
        return nonce, data, self._upload + at.to_bytes(8, "big")


class SealedFile:
    """A committed upload on the coordinator's disk, opened chunk by chunk as it is read; it keeps no descriptor.

    Raises:
        UpdateError: the file's size is not the manifest's.
        SealError: the upload's public key is no key.
        OSError: there is no such file.
    """

    def __init__(self, path: Path, upload: UploadManifest, secret: bytes) -> None:
        self._path, self._site, self._blob = path, upload.site, upload.blob
        self._seal = Seal.of_exchange(upload, secret) if upload.blob.size else None
        size, wanted = path.stat().st_size, sealed_at(upload.blob, upload.blob.size)
        if size != wanted:
            raise UpdateError(upload.site, f"its sealed update has {size} bytes, but its manifest says {wanted}")

    def chunks(self) -> Iterator[bytes]:
        """Yield the plain chunks in order.

        Raises:
            UpdateError: one does not open, or does not have its hash.
        """
        for at in range(0, self._blob.size, self._blob.chunk_bytes):
            plain = self._open(at)
            if hashlib.sha256(plain).digest() != self._blob.chunk(at)[1]:
                raise UpdateError(self._site, f"chunk at byte {at} of its update does not have the manifest's hash")
            yield plain

    def read(self, at: int, size: int) -> bytes:
        """Return plain bytes [at, at + size).

        Raises:
            UpdateError: a chunk does not open.
        """
        step, end = self._blob.chunk_bytes, at + size
        first = at - at % step
        plain = b"".join(self._open(start) for start in range(first, min(end, self._blob.size), step))
        return plain if at == first and len(plain) == size else plain[at - first : end - first]

    def _open(self, at: int) -> bytes:
        assert self._seal is not None, "an upload without a byte has no chunk"
        with self._path.open("rb", buffering=0) as file:
            file.seek(sealed_at(self._blob, at))
            sealed = file.read(self._blob.chunk(at)[0] + TAG_BYTES)
        try:
            return self._seal.open(at, sealed)
        except SealError as error:
            raise UpdateError(self._site, f"its update on disk is damaged: {error}") from None
