"""What is packed comes back to the last bit, and what was not packed against its base is refused by name."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedoap import packing
from fedoap.aggregation import merge_models
from fedoap.config import StrategyConfig
from fedoap.errors import TensorsError, UpdateError
from fedoap.manifests import BlobManifest, Dtype, Packing, TensorSpec, UploadManifest
from fedoap.messages import CHUNK_BYTES
from fedoap.packing import PackedUpdate, pack_blob
from fedoap.tensors import write_blob

Blob = tuple[Path, BlobManifest]
VALUES = CHUNK_BYTES // 4 + 1000
"""Of float32: one chunk and a piece of the next."""
BITS = {"float32": "<u4", "bfloat16": "<u2"}
HIGHEST = {"float32": 0x7F7F_FFFF, "bfloat16": 0x7F7F}
"""The bits of the largest number; those of the smallest have the sign's bit too."""


def written(path: Path, values: NDArray[np.float32], dtype: Dtype = "float32") -> Blob:
    return path, write_blob(path, {"a": values[:5], "b": values[5:]}, dtype)


def upload(blob: BlobManifest) -> UploadManifest:
    return UploadManifest(b"t" * 32, "hospital_a", 3, (), blob)


def packed(folder: Path, new: Blob, old: Blob) -> tuple[Path, UploadManifest]:
    output = folder / "packed"
    return output, upload(pack_blob(*new, *old, output))


def noise(seed: int, values: int = VALUES, scale: float = 1.0) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal(values)).astype(np.float32)


@pytest.fixture
def old(tmp_path: Path) -> Blob:
    return written(tmp_path / "old", noise(0))


@pytest.fixture
def new(tmp_path: Path, old: Blob) -> Blob:
    return written(tmp_path / "new", noise(0) + noise(1, scale=1e-4))


@given(data=st.data(), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_any_finite_bits_come_back_whatever_they_are_packed_against(
    data: st.DataObject, dtype: Dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Planted bugs: a difference that is not taken modulo 2^n; the sign's bit shifted out."""
    folder, top = tmp_path_factory.mktemp("bits"), HIGHEST[dtype]
    sign = 1 << (31 if dtype == "float32" else 15)
    bits = st.integers(0, top).flatmap(lambda low: st.sampled_from([low, low | sign]))
    drawn = data.draw(st.lists(st.tuples(bits, bits), min_size=1, max_size=40))
    blobs = []
    for name, column in zip(("new", "old"), zip(*drawn, strict=True), strict=True):
        (folder / name).write_bytes(np.array(column, BITS[dtype]).tobytes())
        blobs.append((folder / name, BlobManifest((TensorSpec("w", dtype, (len(column),)),), bytes(32))))

    path, update = packed(folder, *blobs)
    read = PackedUpdate(path, update, blobs[1]).read(0, update.blob.plain_size)

    assert read == (folder / "new").read_bytes()
    assert update.blob.size == path.stat().st_size


@pytest.mark.parametrize(("at", "size"), [(0, 8), (CHUNK_BYTES - 4, 8), (CHUNK_BYTES, 4000), (12, CHUNK_BYTES + 400)])
def test_any_piece_is_read_as_if_it_were_plain(tmp_path: Path, new: Blob, old: Blob, at: int, size: int) -> None:
    path, update = packed(tmp_path, new, old)

    assert PackedUpdate(path, update, old).read(at, size) == new[0].read_bytes()[at : at + size]


def test_a_small_change_takes_fewer_bytes_than_the_weights(tmp_path: Path, new: Blob, old: Blob) -> None:
    """Planted bug: no subtraction, so that only what the weights have in common is saved."""
    against = written(tmp_path / "zero", np.zeros(VALUES, np.float32))

    by_change, alone = (packed(tmp_path, new, base)[1].blob.size for base in (old, against))

    assert by_change < 0.8 * alone < 0.8 * new[1].size


def test_a_merge_of_packed_updates_is_that_of_plain_ones_bit_for_bit(tmp_path: Path, new: Blob, old: Blob) -> None:
    path, update = packed(tmp_path, new, old)
    plain = upload(new[1])
    robust = StrategyConfig(rule="median", max_norm_ratio=10.0)

    for strategy in (StrategyConfig(), robust):
        merged = merge_models([(PackedUpdate(path, update, old), update)], old, strategy, tmp_path / "merged")
        assert merged == merge_models([(new[0], plain)], old, strategy, tmp_path / "same")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named_with_its_tensor_and_site(tmp_path: Path, old: Blob, value: float) -> None:
    """Planted bug: only the first chunk is looked at."""
    values = noise(0)
    values[-1] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "first_not_finite", lambda *_: None)  # a site that does not look
        path, update = packed(tmp_path, written(tmp_path / "new", values), old)

    with pytest.raises(UpdateError, match="site hospital_a: tensor b of its update holds a number that is not finite"):
        merge_models([(PackedUpdate(path, update, old), update)], old, StrategyConfig(), tmp_path / "merged")


def test_a_number_that_is_not_finite_is_not_packed(tmp_path: Path, old: Blob) -> None:
    """Planted bug: only the first chunk is looked at."""
    values = noise(0)
    values[-1] = np.nan

    with pytest.raises(TensorsError, match="tensor b holds a number that is not finite"):
        packed(tmp_path, written(tmp_path / "new", values), old)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_chunk_is_unpacked_once_in_a_merge_whose_slices_are_short(
    tmp_path: Path, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted bug: the chunk unpacked last is not kept."""
    sites = 12
    old, new = (written(tmp_path / name, noise(seed, 3 * VALUES), dtype) for seed, name in enumerate(("old", "new")))
    path, update = packed(tmp_path, new, old)
    unpacked, really_unpack = list[int](), PackedUpdate._unpacked

    def count(self: PackedUpdate, at: int) -> bytes:
        unpacked.append(at)
        return really_unpack(self, at)

    monkeypatch.setattr(PackedUpdate, "_unpacked", count)
    updates = [replace(update, site=f"hospital_{number:02}") for number in range(sites)]
    sources = [(PackedUpdate(path, one, old), one) for one in updates]
    merge_models(sources, old, StrategyConfig(rule="median"), tmp_path / "merged")

    assert len(unpacked) == sites * -(-new[1].size // CHUNK_BYTES)


def spoilt(update: UploadManifest, path: Path, frame: bytes) -> UploadManifest:
    """Put another frame in the first chunk's place."""
    before = update.blob.packing
    assert before is not None
    path.write_bytes(frame + path.read_bytes()[before.sizes[0] :])
    after = Packing(before.base, (len(frame), *before.sizes[1:]))
    return replace(update, blob=replace(update.blob, packing=after))


def bomb(size: int, *, tells: bool = True) -> bytes:
    """Return few bytes that unpack to many."""
    return zstandard.ZstdCompressor(write_content_size=tells).compress(bytes(size))


@pytest.mark.parametrize(
    "frame",
    [
        b"\x00" * 100,
        b"\x28",
        bomb(1 << 28),
        bomb(1 << 28, tells=False),
        bomb(CHUNK_BYTES - 4),
        bomb(CHUNK_BYTES) + b"\x00",
        bomb(CHUNK_BYTES)[:-4],
    ],
    ids=["no frame", "a byte", "bomb", "bomb that does not tell", "too short", "more behind it", "cut"],
)
def test_a_chunk_that_does_not_unpack_to_its_size_is_refused_without_room_for_it(
    tmp_path: Path, new: Blob, old: Blob, frame: bytes
) -> None:
    """Planted bugs: a frame opened whatever size it states; bytes behind a frame passed over."""
    path, update = packed(tmp_path, new, old)
    source = PackedUpdate(path, spoilt(update, path, frame), old)

    tracemalloc.start()
    with pytest.raises(UpdateError, match="site hospital_a: packed chunk at byte 0 of its update does not unpack"):
        source.read(0, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 8 * CHUNK_BYTES


def test_a_packing_against_another_model_is_refused(tmp_path: Path, new: Blob, old: Blob) -> None:
    path, update = packed(tmp_path, new, old)

    with pytest.raises(UpdateError, match=r"site hospital_a: its update is packed against model [0-9a-f]{12}, but"):
        PackedUpdate(path, update, written(tmp_path / "older", noise(2)))


def test_blobs_of_other_tables_cannot_be_packed(tmp_path: Path, old: Blob) -> None:
    whole = tmp_path / "whole", write_blob(tmp_path / "whole", {"n": np.arange(3)})

    with pytest.raises(TensorsError, match="its tensors are not those of"):
        pack_blob(*written(tmp_path / "short", noise(0, 100)), *old, tmp_path / "packed")
    with pytest.raises(TensorsError, match=r"only tensors of one dtype of floats can be packed.*int64"):
        pack_blob(*whole, *whole, tmp_path / "packed")
