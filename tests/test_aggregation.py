import hashlib
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from fedoap.aggregation import merge_models
from fedoap.blobfile import convert, without
from fedoap.config import StrategyConfig
from fedoap.errors import TensorsError
from fedoap.manifests import BlobManifest, Dtype, UploadManifest
from fedoap.messages import CHUNK_BYTES
from fedoap.seal import Seal, SealedFile, public_half
from fedoap.tensors import read_blob, write_blob

UNIFORM = StrategyConfig(weighting="uniform")
CASES = StrategyConfig(weighting="cases")


def blob(path: Path, tensors: Mapping[str, ArrayLike], dtype: Dtype = "float32") -> tuple[Path, BlobManifest]:
    return path, write_blob(path, {name: np.asarray(value, np.float32) for name, value in tensors.items()}, dtype)


def update(
    folder: Path, site: str, tensors: Mapping[str, ArrayLike], *, cases: int = 1, dtype: Dtype = "float32"
) -> tuple[Path, UploadManifest]:
    path, manifest = blob(folder / site, tensors, dtype)
    return path, UploadManifest(b"t" * 32, site, cases, (), manifest)


def random_updates(
    folder: Path, sites: int, shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[Path, UploadManifest]]:
    rng = np.random.default_rng(7)
    return [
        update(folder, f"s{i}", {name: rng.normal(size=shape) for name, shape in shapes.items()}, cases=1 + 3 * i)
        for i in range(sites)
    ]


def test_sites_count_alike_or_by_their_cases(tmp_path: Path) -> None:
    base = blob(tmp_path / "base", {"w": [10.0, 10.0]})
    updates = [update(tmp_path, "a", {"w": [1.0, 2.0]}, cases=1), update(tmp_path, "b", {"w": [5.0, -2.0]}, cases=3)]

    uniform = merge_models(updates, base, UNIFORM, tmp_path / "u")
    weighted = merge_models(updates, base, CASES, tmp_path / "c")

    assert read_blob(tmp_path / "u", uniform)["w"].tolist() == [3.0, 0.0]
    assert read_blob(tmp_path / "c", weighted)["w"].tolist() == [4.0, -1.0]


def test_the_server_rate_scales_the_step_from_the_base(tmp_path: Path) -> None:
    base = blob(tmp_path / "base", {"w": [10.0, 0.0]})
    updates = [update(tmp_path, "a", {"w": [4.0, 1.0]}), update(tmp_path, "b", {"w": [8.0, 3.0]})]
    half = StrategyConfig(server_learning_rate=0.5)

    manifest = merge_models(updates, base, half, tmp_path / "out")

    assert read_blob(tmp_path / "out", manifest)["w"].tolist() == [8.0, 1.0]


def test_the_mean_of_equal_updates_is_that_update_to_the_last_bit(tmp_path: Path) -> None:
    """Planted bug: sums in float32."""
    values = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    base = blob(tmp_path / "base", {"w": values * 1e6})
    updates = [update(tmp_path, site, {"w": values}) for site in "abc"]

    manifest = merge_models(updates, base, UNIFORM, tmp_path / "out")

    assert np.array_equal(read_blob(tmp_path / "out", manifest)["w"], values)


def test_bits_depend_neither_on_slices_nor_on_the_order_of_arrival(tmp_path: Path) -> None:
    """Planted bug: the last slice of a tensor left out."""
    shapes = {"a": (37, 11), "b": (), "c": (5000,), "d": (0, 4)}
    updates = random_updates(tmp_path, 5, shapes)
    base = blob(tmp_path / "base", {name: np.ones(shape) for name, shape in shapes.items()})
    ids = set()

    for number, size in enumerate((1, 7, 64, 4999, 5000, 1 << 19)):
        some = updates[number:] + updates[:number]
        manifest = merge_models(some, base, CASES, tmp_path / "out", slice_values=size)
        ids.add((manifest.id, hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest()))

    assert len(ids) == 1


def test_sums_run_in_the_order_of_the_sites_names(tmp_path: Path) -> None:
    """3 + 1e30 - 1e30 is 0, and 1e30 - 1e30 + 3 is 3. Planted bug: updates summed in the order given."""
    base = blob(tmp_path / "base", {"w": [0.0]})
    values = {"a": 1e30, "b": -1e30, "c": 3.0}
    means = []

    for order in ("abc", "cab", "bca"):
        updates = [update(tmp_path, site, {"w": [values[site]]}) for site in order]
        manifest = merge_models(updates, base, UNIFORM, tmp_path / "out")
        means.append(read_blob(tmp_path / "out", manifest)["w"].tolist())

    assert means == [[1.0]] * 3


def test_the_manifest_names_the_bytes_on_disk(tmp_path: Path) -> None:
    size = CHUNK_BYTES // 4 + 3
    updates = random_updates(tmp_path, 2, {"a": (5,), "b": (size,)})
    base = blob(tmp_path / "base", {"a": np.zeros(5), "b": np.zeros(size)})

    manifest = merge_models(updates, base, UNIFORM, tmp_path / "out", slice_values=1000)

    assert manifest == write_blob(tmp_path / "again", read_blob(tmp_path / "out", manifest))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "out").read_bytes()


def test_bfloat16_updates_move_a_float32_base(tmp_path: Path) -> None:
    base = blob(tmp_path / "base", {"w": [1.0, 1.0 + 2**-20]})
    updates = [
        update(tmp_path, "a", {"w": [2.0, 4.0]}, dtype="bfloat16"),
        update(tmp_path, "b", {"w": [3.0, 4.0]}, dtype="bfloat16"),
    ]
    slow = StrategyConfig(server_learning_rate=0.25)

    manifest = merge_models(updates, base, slow, tmp_path / "out")

    assert read_blob(tmp_path / "out", manifest)["w"].tolist() == [1.375, 1.75 + 0.75 * 2**-20]


def test_memory_grows_neither_with_the_model_nor_with_the_sites(tmp_path: Path) -> None:
    """12 sites of 16 MB. Planted bugs: a whole tensor read; every site's slice held at once."""
    values = np.random.default_rng(2).normal(size=4 << 20).astype(np.float32)
    base = blob(tmp_path / "base", {"w": values})
    path, manifest = update(tmp_path, "a", {"w": values})
    updates = [(path, UploadManifest(b"t" * 32, f"s{i:02}", 1, (), manifest.blob)) for i in range(12)]

    tracemalloc.start()
    merge_models(updates, base, UNIFORM, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 32e6


def test_each_chunk_of_a_sealed_update_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted bug: slices that begin with each tensor."""
    tensors = {f"w{k}": np.full(300_000, k) for k in range(4)}
    base = blob(tmp_path / "base", tensors)
    (path, plain), exchange, site = update(tmp_path, "a", tensors), b"e" * 32, b"s" * 32
    manifest = replace(plain, seal_key=public_half(site))
    seal, raw = Seal.of_site(manifest, site, public_half(exchange)), path.read_bytes()
    starts = range(0, len(raw), CHUNK_BYTES)
    path.write_bytes(b"".join(seal.close(at, raw[at : at + CHUNK_BYTES]) for at in starts))
    opened, really_open = list[int](), Seal.open

    def count(seal: Seal, at: int, sealed: bytes | memoryview) -> bytes:
        opened.append(at)
        return really_open(seal, at, sealed)

    monkeypatch.setattr(Seal, "open", count)
    merged = merge_models([(SealedFile(path, manifest, exchange), manifest)], base, UNIFORM, tmp_path / "out")

    assert opened == list(starts)
    assert merged == base[1]


def test_an_update_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    base = blob(tmp_path / "base", {"w": [1.0, 2.0]})
    good = update(tmp_path, "good", {"w": [1.0, 2.0]})
    shape = update(tmp_path, "shape", {"w": [[1.0, 2.0]]})
    name = update(tmp_path, "name", {"v": [1.0, 2.0]})
    empty = update(tmp_path, "empty", {"w": [1.0, 2.0]}, cases=0)

    for odd in (shape, name, empty):
        with pytest.raises(TensorsError, match=f"site {odd[1].site}: "):
            merge_models([good, odd], base, UNIFORM, tmp_path / "out")
    with pytest.raises(TensorsError, match="site good: has more than one update"):
        merge_models([good, good], base, UNIFORM, tmp_path / "out")
    with pytest.raises(TensorsError, match="no update"):
        merge_models([], base, UNIFORM, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whole_numbers_have_no_mean(tmp_path: Path) -> None:
    manifest = write_blob(tmp_path / "base", {"n": np.arange(3)})
    update_manifest = UploadManifest(b"t" * 32, "a", 1, (), manifest)

    with pytest.raises(TensorsError, match="n is int64"):
        merge_models([(tmp_path / "base", update_manifest)], (tmp_path / "base", manifest), UNIFORM, tmp_path / "out")


def test_a_mean_that_overflows_leaves_no_file(tmp_path: Path) -> None:
    base = blob(tmp_path / "base", {"w": [-3e38]})
    far = StrategyConfig(server_learning_rate=2.0)

    with pytest.raises(TensorsError, match="w: the updates' mean is not finite"):
        merge_models([update(tmp_path, "a", {"w": [3e38]})], base, far, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    base = blob(tmp_path / "base", {"w": [1.0, 2.0]})
    odd = update(tmp_path, "a", {"w": [1.0, 2.0]})
    odd[0].write_bytes(b"1234")

    with pytest.raises(TensorsError, match="4 bytes, but its manifest says 8"):
        merge_models([odd], base, UNIFORM, tmp_path / "out")


def test_conversion_rounds_floats_and_keeps_whole_numbers(tmp_path: Path) -> None:
    values: dict[str, NDArray[np.generic]] = {"n": np.arange(3), "w": np.array([1.0, 1.0 + 2**-12, -3.0], np.float32)}
    manifest = write_blob(tmp_path / "a", values)

    narrow = convert(tmp_path / "a", manifest, tmp_path / "b", "bfloat16")
    wide = convert(tmp_path / "b", narrow, tmp_path / "c", "float32")

    assert narrow == write_blob(tmp_path / "d", values, "bfloat16")
    assert read_blob(tmp_path / "c", wide)["w"].tolist() == [1.0, 1.0, -3.0]
    assert read_blob(tmp_path / "c", wide)["n"].tolist() == [0, 1, 2]


def test_tensors_of_a_prefix_are_left_out_and_the_others_keep_their_bits(tmp_path: Path) -> None:
    path, manifest = blob(tmp_path / "a", {"control.w": [9.0], "controls": [3.0], "w": [1.0, 2.0]}, "bfloat16")

    rest = without(path, manifest, "control.", tmp_path / "b")

    assert rest == write_blob(tmp_path / "c", {"controls": np.array([3.0]), "w": np.array([1.0, 2.0])}, "bfloat16")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
