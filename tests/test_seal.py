"""A seal opens for one exchange, upload, site, task and place, and for nothing else."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoap.errors import RefusedError, SealError, UpdateError
from fedoap.manifests import NO_KEY, BlobManifest, TensorSpec, UploadManifest
from fedoap.seal import TAG_BYTES, Seal, SealedFile, public_half, sealed_at
from fedoap.transfer import Receiver

EXCHANGE, SITE, OTHER = b"e" * 32, b"s" * 32, b"o" * 32
CHUNK = 64
RAW = np.arange(40, dtype=np.float32).tobytes()


def upload(raw: bytes = RAW, key: bytes = SITE) -> UploadManifest:
    hashes = b"".join(hashlib.sha256(raw[at : at + CHUNK]).digest() for at in range(0, len(raw), CHUNK))
    blob = BlobManifest((TensorSpec("w", "float32", (len(raw) // 4,)),), hashes, CHUNK)
    return UploadManifest(b"t" * 32, "hospital_a", 3, (("loss", 0.5),), blob, public_half(key))


def chunk(of: UploadManifest, at: int, *, secret: bytes = SITE, exchange: bytes = EXCHANGE) -> bytes:
    return Seal.of_site(of, secret, public_half(exchange)).close(at, RAW[at : at + CHUNK])


def receiver() -> Receiver:
    made = Receiver(upload().blob, seal=Seal.of_exchange(upload(), EXCHANGE))
    made.grant(0.0)
    return made


def test_what_a_site_seals_the_coordinator_opens() -> None:
    seal = Seal.of_exchange(upload(), EXCHANGE)

    plain = b"".join(seal.open(at, chunk(upload(), at)) for at in range(0, len(RAW), CHUNK))

    assert plain == RAW


SEALED: dict[str, Callable[[], bytes]] = {
    "another exchange": lambda: chunk(upload(), 0, exchange=OTHER),
    "another upload": lambda: chunk(replace(upload(), cases=4), 0),
    "another site": lambda: chunk(replace(upload(), site="hospital_b"), 0),
    "another task": lambda: chunk(replace(upload(), task=b"u" * 32), 0),
    "another offset": lambda: Seal.of_site(upload(), SITE, public_half(EXCHANGE)).close(CHUNK, RAW[:CHUNK]),
    "another key": lambda: chunk(upload(), 0, secret=OTHER),
    "nothing": lambda: RAW[:CHUNK] + bytes(TAG_BYTES),
}


@pytest.mark.parametrize("sealed", SEALED)
def test_a_chunk_that_was_sealed_for_something_else_is_refused_as_corrupt(sealed: str) -> None:
    """Planted bugs: no upload in the associated data nor in the key; one nonce and no offset for all chunks."""
    taker = receiver()

    with pytest.raises(RefusedError, match="does not open") as caught:
        taker.take(0, memoryview(SEALED[sealed]()), 0.0)

    assert (caught.value.code, taker.at) == ("corrupt", 0)
    assert taker.take(0, memoryview(chunk(upload(), 0)), 0.0) == "new"


@given(st.integers(0, (CHUNK + TAG_BYTES) * 8 - 1))
def test_a_chunk_with_any_bit_flipped_is_refused_as_corrupt(bit: int) -> None:
    spoilt = bytearray(chunk(upload(), 0))
    spoilt[bit // 8] ^= 1 << bit % 8

    with pytest.raises(RefusedError) as caught:
        receiver().take(0, memoryview(spoilt), 0.0)

    assert caught.value.code == "corrupt"


def test_a_chunk_that_opens_but_is_not_what_the_manifest_says_is_refused_as_corrupt() -> None:
    false = Seal.of_site(upload(), SITE, public_half(EXCHANGE)).close(0, bytes(CHUNK))

    with pytest.raises(RefusedError, match="does not have the hash that the manifest names"):
        receiver().take(0, memoryview(false), 0.0)


@pytest.mark.parametrize("key", [NO_KEY, b"\1" + bytes(31)])
def test_a_key_that_agrees_with_no_secret_is_refused(key: bytes) -> None:
    with pytest.raises(SealError, match="its key and its exchange's agree on nothing"):
        Seal.of_exchange(replace(upload(), seal_key=key), EXCHANGE)


def sealed_file(folder: Path) -> Path:
    path = folder / "upload"
    path.write_bytes(b"".join(chunk(upload(), at) for at in range(0, len(RAW), CHUNK)))
    return path


@given(st.data())
def test_any_piece_of_a_sealed_file_is_read_as_it_was_sealed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Planted bug: pieces that end in the chunk after the one that they start in, cut short."""
    file = SealedFile(sealed_file(tmp_path_factory.mktemp("sealed")), upload(), EXCHANGE)
    at = data.draw(st.integers(0, len(RAW)))
    size = data.draw(st.integers(0, len(RAW) - at))

    assert file.read(at, size) == RAW[at : at + size]
    assert b"".join(file.chunks()) == RAW


def test_a_sealed_file_is_as_long_as_its_chunks_and_their_tags(tmp_path: Path) -> None:
    blob = upload().blob

    assert [sealed_at(blob, at) for at in (0, 64, 128, 160)] == [0, 80, 160, 208]
    assert sealed_file(tmp_path).stat().st_size == 208


def test_a_sealed_file_with_a_flipped_bit_names_its_site(tmp_path: Path) -> None:
    path = sealed_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    file = SealedFile(path, upload(), EXCHANGE)

    with pytest.raises(UpdateError, match="site hospital_a: its update on disk is damaged: chunk at byte 64") as caught:
        list(file.chunks())

    assert caught.value.site == "hospital_a"
    assert file.read(0, 64) == RAW[:64]


def test_a_sealed_file_that_was_cut_or_is_anothers_is_refused(tmp_path: Path) -> None:
    path = sealed_file(tmp_path)
    with pytest.raises(UpdateError, match="does not open"):
        list(SealedFile(path, upload(), OTHER).chunks())

    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UpdateError, match="its sealed update has 207 bytes, but its manifest says 208"):
        SealedFile(path, upload(), EXCHANGE)
