import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedoap.errors import TensorsError
from fedoap.manifests import MOST_PACKED_BYTES, BlobManifest, Packing, TaskManifest, TensorSpec, UploadManifest
from fedoap.messages import CHUNK_BYTES
from fedoap.tensors import as_float32, bfloat16_bits, float32_values, read_blob, write_blob

HASH = bytes(range(32))
NAMES = st.text(st.characters(categories=["L", "M", "N", "P", "S"]), min_size=1, max_size=20)
SPECS = st.builds(
    TensorSpec,
    NAMES,
    st.sampled_from(["float32", "bfloat16", "int64"]),
    st.lists(st.integers(0, 300), max_size=3).map(tuple),
)


@st.composite
def manifests(draw: st.DrawFn) -> BlobManifest:
    specs = draw(st.lists(SPECS, max_size=5, unique_by=lambda spec: spec.name))
    ordered = tuple(sorted(specs, key=lambda spec: spec.name))
    chunks = -(-sum(spec.size for spec in ordered) // CHUNK_BYTES)
    if not draw(st.booleans()):
        return BlobManifest(ordered, HASH * chunks)
    sizes = draw(st.lists(st.integers(1, MOST_PACKED_BYTES), min_size=chunks, max_size=chunks))
    return BlobManifest(ordered, HASH * -(-sum(sizes) // CHUNK_BYTES), packing=Packing(HASH, tuple(sizes)))


TASKS = st.builds(
    TaskManifest,
    st.just("demo"),
    st.just(HASH),
    st.sampled_from(["init", "seed", "bank", "train", "calibrate"]),
    st.integers(0, 99),
    st.integers(1, 9),
    st.lists(NAMES, max_size=3).map(tuple),
    st.integers(0, 2**31),
    st.none() | manifests(),
    st.none() | manifests(),
)
METRICS = st.dictionaries(NAMES, st.floats(allow_nan=False, allow_infinity=False), max_size=3)
UPLOADS = st.builds(
    UploadManifest,
    st.just(HASH),
    NAMES,
    st.integers(0, 2**31),
    METRICS.map(lambda metrics: tuple(metrics.items())),
    manifests(),
)


@given(manifests())
def test_a_blobs_manifest_survives_packing(manifest: BlobManifest) -> None:
    """Planted bug: `pack` that sorts the shape."""
    assert BlobManifest.unpack(manifest.pack()) == manifest


@given(TASKS)
def test_a_task_survives_packing(task: TaskManifest) -> None:
    """Planted bug: `unpack` that swaps model and bank."""
    assert TaskManifest.unpack(task.pack()) == task


@given(UPLOADS)
def test_an_upload_survives_packing(upload: UploadManifest) -> None:
    """Planted bug: metrics that are sorted on the way."""
    assert UploadManifest.unpack(upload.pack()) == upload


@given(UPLOADS, TASKS, st.data())
def test_garbled_manifests_raise_nothing_but_tensors_error(
    upload: UploadManifest, task: TaskManifest, data: st.DataObject
) -> None:
    """What is taken all the same says the same again. Planted bug: `_unpack` that lets `UnicodeDecodeError` through."""
    for packed, unpack in ((upload.pack(), UploadManifest.unpack), (task.pack(), TaskManifest.unpack)):
        garbled = bytearray(packed)
        for _ in range(data.draw(st.integers(1, 5))):
            garbled[data.draw(st.integers(0, len(garbled) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(TensorsError):
            taken = unpack(bytes(garbled))
            assert unpack(taken.pack()) == taken


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3) | st.binary()


def _spoilt(value: object, draw: Callable[[st.SearchStrategy[object]], object]) -> object:
    """The value with one of its parts, whichever, replaced by something else."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: _spoilt(value[key], draw)}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        index = draw(st.sampled_from(range(len(value))))
        return [_spoilt(one, draw) if at == index else one for at, one in enumerate(value)]
    return draw(SCALARS | st.lists(SCALARS, max_size=2))


@given(UPLOADS, TASKS, manifests(), st.data())
def test_manifests_with_a_part_of_another_type_raise_nothing_but_tensors_error(
    upload: UploadManifest, task: TaskManifest, blob: BlobManifest, data: st.DataObject
) -> None:
    """Planted bug: `_spec` that takes a shape of any type."""
    kinds = ((upload, UploadManifest.unpack), (task, TaskManifest.unpack), (blob, BlobManifest.unpack))
    for manifest, unpack in kinds:
        spoilt = _spoilt(msgpack.unpackb(manifest.pack()), data.draw)
        with contextlib.suppress(TensorsError):
            taken = unpack(msgpack.packb(spoilt))
            assert unpack(taken.pack()) == taken


def _packed(**changes: object) -> bytes:
    rows = [["a", "float32", [2]], ["b", "int64", [1]]]
    fields = {"v": 1, "tensors": rows, "chunk": CHUNK_BYTES, "sha256": HASH} | changes
    packed: bytes = msgpack.packb(fields)
    return packed


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"v": 2}, "keys or types are not those of version 1"),
        ({"more": 1}, "keys or types are not those of version 1"),
        ({"tensors": [["b", "int64", [1]], ["a", "float32", [2]]]}, "names must be sorted and occur once"),
        ({"tensors": [["a", "int64", [1]], ["a", "int64", [1]]]}, "names must be sorted and occur once"),
        ({"tensors": [["a", "float64", [2]]]}, "a tensor's row must be"),
        ({"tensors": [["a", "float32", [-2]]]}, "a tensor's row must be"),
        ({"tensors": [["a", "float32", [True]]]}, "a tensor's row must be"),
        ({"tensors": [["", "float32", [2]]]}, "a tensor's row must be"),
        ({"tensors": [["\x1b[2J", "float32", [4]]]}, "a tensor's row must be"),
        ({"tensors": [["a", "float32", [2**39, 2**39]]]}, "32 bytes of hashes do not fit"),
        ({"sha256": HASH[:31]}, "31 bytes of hashes do not fit 16 bytes"),
        ({"sha256": HASH * 2}, "64 bytes of hashes do not fit 16 bytes"),
        ({"chunk": 512}, "do not fit"),
        ({"base": HASH}, "keys or types are not those of version 1"),
        ({"base": HASH[:31], "sizes": [16]}, "keys or types are not those of version 1"),
        ({"base": HASH, "sizes": [16], "more": 1}, "keys or types are not those of version 1"),
        ({"base": HASH, "sizes": [0]}, "a packed chunk must have 1 to 1052736 bytes"),
        ({"base": HASH, "sizes": [True]}, "a packed chunk must have 1 to 1052736 bytes"),
        ({"base": HASH, "sizes": [1052737]}, "a packed chunk must have 1 to 1052736 bytes"),
        ({"base": HASH, "sizes": [16, 16]}, "2 packed chunks do not fit 16 bytes of tensors"),
        ({"base": HASH, "sizes": []}, "32 bytes of hashes do not fit 0 bytes"),
    ],
)
def test_a_manifest_whose_parts_do_not_fit_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(TensorsError, match=reason):
        BlobManifest.unpack(_packed(**changes))


def _backwards(packed: bytes) -> bytes:
    return bytes(msgpack.packb(dict(reversed(msgpack.unpackb(packed).items()))))


@pytest.mark.parametrize("other", [_backwards, lambda packed: packed.replace(b"\xa1v\x01", b"\xa1v\xcc\x01", 1)])
def test_a_manifest_in_other_bytes_than_the_canonical_ones_is_refused(other: Callable[[bytes], bytes]) -> None:
    """A manifest goes by its bytes' hash. Planted bug: no comparison with the canonical bytes, for each kind."""
    blob = BlobManifest((TensorSpec("a", "float32", (2,)),), HASH)
    task = TaskManifest("demo", HASH, "train", 1, 1, ("a",), 60, blob)
    upload = UploadManifest(HASH, "a", 1, (), blob)

    for manifest in (blob, task, upload):
        with pytest.raises(TensorsError, match="its bytes are not the canonical ones"):
            manifest.unpack(other(manifest.pack()))


@pytest.mark.parametrize("name", ["", "x" * 65, "\x1b[2J"])
def test_a_metric_whose_name_cannot_be_printed_is_refused(name: str) -> None:
    upload = UploadManifest(HASH, "a", 1, ((name, 0.5),), BlobManifest((), b""))

    with pytest.raises(TensorsError, match="a metric's name must have 1 to 64 printable characters"):
        UploadManifest.unpack(upload.pack())


@pytest.mark.parametrize("cases", [-1, True, 1.0])
def test_a_number_of_cases_that_is_none_is_refused(cases: int) -> None:
    """Planted bug: true counts as 1."""
    upload = UploadManifest(HASH, "a", cases, (), BlobManifest((), b""))

    with pytest.raises(TensorsError, match="upload: keys or types are not those of version 1"):
        UploadManifest.unpack(upload.pack())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1])
def test_a_metric_that_is_not_a_finite_float_is_refused(value: float) -> None:
    upload = UploadManifest(HASH, "a", 1, (("dice", value),), BlobManifest((), b""))

    with pytest.raises(TensorsError, match="upload: a metric is not a finite number"):
        UploadManifest.unpack(upload.pack())


def test_work_is_the_same_whatever_the_attempt_and_another_with_another_model() -> None:
    model = BlobManifest((TensorSpec("a", "float32", (2,)),), HASH)
    first = TaskManifest("demo", HASH, "train", 1, 1, ("a",), 60, model)
    second = TaskManifest("demo", HASH, "train", 1, 2, ("a", "b"), 90, model)
    other = TaskManifest("demo", HASH, "train", 1, 1, ("a",), 60, None)

    assert first.work == second.work
    assert first.work != other.work


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_blob_of_several_chunks_is_read_back_as_it_was_written(dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "weight": rng.standard_normal((300_001,)).astype(np.float32),
        "scalar": np.float32(2.5),
        "none": np.zeros((0, 4), np.float32),
        "counts": rng.integers(-9, 9, (3, 5)),
    }

    manifest = write_blob(tmp_path / "blob", tensors, dtype)  # type: ignore[arg-type]
    read = read_blob(tmp_path / "blob", manifest)

    assert len(manifest.hashes) // 32 == -(-manifest.size // CHUNK_BYTES)
    for name, array in tensors.items():
        wanted = array if dtype == "float32" or name == "counts" else float32_values(bfloat16_bits(np.asarray(array)))
        np.testing.assert_array_equal(read[name], wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_manifest_names_the_bytes_on_disk_whatever_the_arrays_layout(dtype: str, tmp_path: Path) -> None:
    """Planted bugs: a piece hashed whole where a chunk ends within it; bytes in memory order of a transposed array."""
    values = np.random.default_rng(3).standard_normal((700, 801))
    tensors = {"a": values[:, :3].T, "b": np.asfortranarray(values), "c": values[::2], "d": np.arange(9)[::-1]}

    manifest = write_blob(tmp_path / "blob", tensors, dtype)  # type: ignore[arg-type]

    raw = (tmp_path / "blob").read_bytes()
    pieces = [raw[at : at + CHUNK_BYTES] for at in range(0, len(raw), CHUNK_BYTES)]
    assert manifest.hashes == b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    assert manifest.size == len(raw)
    assert np.array_equal(read_blob(tmp_path / "blob", manifest)["d"], np.arange(9)[::-1])
    wanted = values.astype(np.float32) if dtype == "float32" else float32_values(bfloat16_bits(values.astype("f4")))
    assert np.array_equal(read_blob(tmp_path / "blob", manifest)["b"], wanted)


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    manifest = write_blob(tmp_path / "blob", {"a": np.ones(4, np.float32)})
    (tmp_path / "blob").write_bytes(bytes(15))

    with pytest.raises(TensorsError, match="file has 15 bytes, but its manifest says 16"):
        read_blob(tmp_path / "blob", manifest)


@given(st.floats(width=32))
def test_bfloat16_is_the_nearest_of_its_neighbours_and_keeps_what_is_not_finite(value: float) -> None:
    """Planted bug: truncation instead of rounding."""
    one = np.array([value], np.float32)

    rounded = as_float32(bfloat16_bits(one).tobytes(), "bfloat16")

    if not np.isfinite(value):
        np.testing.assert_array_equal(rounded, one)
        return
    bits = int(one.view(np.uint32)[0]) & 0xFFFF0000
    below, above = (np.array([min(b, 0xFFFF0000)], np.uint32).view(np.float32)[0] for b in (bits, bits + 0x10000))
    finite = [x for x in (below, above) if np.isfinite(x)]
    nearest = min(abs(np.float64(x) - np.float64(value)) for x in finite)
    if np.isfinite(rounded[0]):
        assert abs(np.float64(rounded[0]) - np.float64(value)) <= nearest
    else:
        assert len(finite) == 1
