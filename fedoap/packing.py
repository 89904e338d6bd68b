"""Lossless packing of an update as its difference from the model that its round began with.

A short round moves a weight in its last bits only. So each weight's bits are taken as a whole number, the
model's are subtracted, modulo 2^32 or 2^16, and the sign goes to the lowest bit; then the first byte of all
differences comes first, then the second of all, and zstd finds the high ones to be nearly all zero. The
difference wins over XOR, which a carry fills with ones (measured: docs/performance.md).

Each chunk of the plain blob is packed by itself, so a merge still reads any slice in bounded memory. What is
packed is what travels, is hashed, sealed and stored; it is unpacked where it is merged and nowhere before.
"""

from itertools import accumulate
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray

from fedoap.blobfile import BlobReader, ByteSource, read_piece
from fedoap.errors import TensorsError, UpdateError
from fedoap.manifests import ITEM_BYTES, BlobManifest, Dtype, Packing, UploadManifest
from fedoap.messages import CHUNK_BYTES
from fedoap.tensors import ChunkHashes, first_not_finite, open_to_overwrite, write_all

LEVEL = 1
"""Of zstd."""
MOST_KEPT = 64
"""Up to this many updates keep the chunk unpacked last, for a merge whose slices are shorter than chunks."""


def pack_blob(
    plain: Path, manifest: BlobManifest, base: Path, base_manifest: BlobManifest, output: Path
) -> BlobManifest:
    """Write a blob packed as its difference from another of the same table, and return the manifest of what travels.

    Raises:
        TensorsError: the tables differ, the dtypes are not one dtype of floats, a number is not finite, or a file
            does not fit its manifest.
        OSError: the disk refuses.
    """
    if manifest.tensors != base_manifest.tensors:
        raise TensorsError(f"{plain}: cannot be packed, as its tensors are not those of {base}")
    source, old = BlobReader(plain, manifest), BlobReader(base, base_manifest)
    dtype = _dtype(manifest)
    step = CHUNK_BYTES // ITEM_BYTES[dtype]
    packer, hashes, sizes = zstandard.ZstdCompressor(level=LEVEL), ChunkHashes(), list[int]()
    with open_to_overwrite(output) as file:
        for start in range(0, source.values, step):
            stop = min(start + step, source.values)
            raw = source.raw(start, stop)
            bad = first_not_finite(memoryview(raw), dtype)
            if bad is not None:
                raise TensorsError(f"tensor {source.name(start + bad)} holds a number that is not finite")
            packed = packer.compress(_difference(raw, old.raw(start, stop), dtype))
            sizes.append(len(packed))
            hashes.add(packed)
            write_all(file, packed)
        file.truncate(sum(sizes))
    return BlobManifest(manifest.tensors, hashes.all(), packing=Packing(base_manifest.id, tuple(sizes)))


class PackedUpdate:
    """A site's packed update, read as the plain blob that it stands for; each piece is checked as it is unpacked.

    Args:
        packed: Where its packed bytes are.
        upload: Whose it is, and what it holds.
        base: File and manifest of the blob that it is packed against.
        keeps: Whether the chunk unpacked last stays in memory: pieces are read in order, and may be shorter.

    Raises:
        UpdateError: it is packed against another blob, or one that does not fit.
    """

    def __init__(
        self, packed: Path | ByteSource, upload: UploadManifest, base: tuple[Path, BlobManifest], *, keeps: bool = True
    ) -> None:
        packing, (path, model) = upload.blob.packing, base
        assert packing is not None, "what is not packed is read as it is"
        if packing.base != model.id or upload.blob.tensors != model.tensors:
            against = f"{packing.base.hex()[:12]}, but its round's model is {model.id.hex()[:12]}, or of another table"
            raise UpdateError(upload.site, f"its update is packed against model {against}")
        self._packed, self._site, self._blob = packed, upload.site, upload.blob
        self._base, self._dtype = BlobReader(path, model), _dtype(model)
        self._ends = list(accumulate(packing.sizes))
        self._unpacker = zstandard.ZstdDecompressor()
        self._keeps, self._last = keeps, (-1, b"")

    def read(self, at: int, size: int) -> bytes:
        """Return plain bytes [at, at + size).

        Raises:
            UpdateError: a chunk does not unpack, or holds a number that is not finite.
        """
        end, first = at + size, at - at % CHUNK_BYTES
        plain = b"".join(map(self._chunk, range(first, end, CHUNK_BYTES)))
        return plain if at == first and len(plain) == size else plain[at - first : end - first]

    def _chunk(self, at: int) -> bytes:
        if self._last[0] == at:
            return self._last[1]
        plain = self._unpacked(at)
        if self._keeps:
            self._last = at, plain
        return plain

    def _unpacked(self, at: int) -> bytes:
        end, number = min(at + CHUNK_BYTES, self._blob.plain_size), at // CHUNK_BYTES
        before = self._ends[number - 1] if number else 0
        packed = read_piece(self._packed, before, self._ends[number] - before)
        item = ITEM_BYTES[self._dtype]
        start, stop = at // item, end // item
        plain = _sum(self._unpack(packed, at, end - at), self._base.raw(start, stop), self._dtype)
        bad = first_not_finite(memoryview(plain), self._dtype)
        if bad is not None:
            name = self._base.name(start + bad)
            raise UpdateError(self._site, f"tensor {name} of its update holds a number that is not finite")
        return plain

    def _unpack(self, packed: bytes, at: int, size: int) -> bytes:
        """Return `size` bytes; a frame that claims more is not opened, as it might not fit into memory."""
        try:
            if zstandard.frame_content_size(packed) == size:
                unpacked = self._unpacker.decompress(packed, allow_extra_data=False)
                if len(unpacked) == size:
                    return unpacked
        except zstandard.ZstdError:
            pass
        raise UpdateError(self._site, f"packed chunk at byte {at} of its update does not unpack to {size} bytes")


def _dtype(manifest: BlobManifest) -> Dtype:
    kinds = {spec.dtype for spec in manifest.tensors}
    match sorted(kinds):
        case ["float32" | "bfloat16" as dtype]:
            return dtype
    raise TensorsError(f"only tensors of one dtype of floats can be packed, but there are {sorted(kinds)}")


def _difference(new: bytes, old: bytes, dtype: Dtype) -> bytes:
    """Return the differences of two runs of floats' bits, the sign in the lowest bit, all first bytes first."""
    change = _bits(new, dtype) - _bits(old, dtype)
    signed = change.view(f"<i{change.itemsize}")
    folded = (signed << 1) ^ (signed >> (8 * change.itemsize - 1))
    return folded.view(np.uint8).reshape(-1, change.itemsize).T.tobytes()


def _sum(difference: bytes, old: bytes, dtype: Dtype) -> bytes:
    """Return the bits that have this difference from the old ones."""
    before = _bits(old, dtype)
    columns = np.frombuffer(difference, np.uint8).reshape(before.itemsize, -1)
    folded = np.ascontiguousarray(columns.T).view(before.dtype).ravel()
    sign = np.negative(folded & 1)
    return bytes((before + ((folded >> 1) ^ sign)).data)


def _bits(raw: bytes, dtype: Dtype) -> NDArray[np.unsignedinteger]:
    return np.frombuffer(raw, f"<u{ITEM_BYTES[dtype]}")
