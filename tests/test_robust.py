"""The robust rules against arithmetic in plain Python, and against one site that does harm."""

import hashlib
import math
import statistics
import tempfile
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedoap.aggregation import merge_models
from fedoap.config import StrategyConfig
from fedoap.errors import UpdateError
from fedoap.manifests import BlobManifest, Dtype, UploadManifest
from fedoap.robust import median, outlier, trimmed_mean
from fedoap.tensors import read_blob, write_blob

MEDIAN = StrategyConfig(rule="median")
TRIMMED = StrategyConfig(rule="trimmed_mean")
BOUND = StrategyConfig(max_norm_ratio=3.0)
Tensors = Mapping[str, NDArray[np.generic]]

# few distinct values, so that most columns hold ties; float32's largest, its smallest, and both zeros
numbers = st.sampled_from([0.0, -0.0, 1.0, 1.0, -2.5, 1 / 3, 1e-45, 3e38, -3e38]) | st.floats(-8, 8, width=32)
shapes = st.lists(st.sampled_from([(), (1,), (5,), (2, 3), (0, 4), (7,)]), min_size=1, max_size=3)


@st.composite
def cohorts(draw: st.DrawFn) -> list[Tensors]:
    sites, sizes = draw(st.integers(1, 20)), draw(shapes)

    def tensor(shape: tuple[int, ...]) -> NDArray[np.float32]:
        count = math.prod(shape)
        return np.array(draw(st.lists(numbers, min_size=count, max_size=count)), np.float32).reshape(shape)

    return [{f"t{i}": tensor(shape) for i, shape in enumerate(sizes)} for _ in range(sites)]


def merged(
    cohort: Sequence[Tensors],
    strategy: StrategyConfig,
    dtype: Dtype = "float32",
    *,
    base: Tensors | None = None,
    slice_values: int = 1 << 19,
    turn: int = 0,
) -> tuple[dict[str, NDArray[np.generic]], list[dict[str, NDArray[np.generic]]], str]:
    """Return the merged tensors, what the sites' blobs hold, and the hash of the result's bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = base or {key: np.zeros_like(value) for key, value in cohort[0].items()}
        model = (folder / "base", write_blob(folder / "base", start))
        updates = [update(folder, f"s{i:02}", tensors, dtype) for i, tensors in enumerate(cohort)]
        read = [read_blob(path, manifest.blob) for path, manifest in updates]
        arrived = updates[turn:] + updates[:turn]
        manifest = merge_models(arrived, model, strategy, folder / "out", slice_values=slice_values)
        digest = hashlib.sha256((folder / "out").read_bytes()).hexdigest()
        return read_blob(folder / "out", manifest), read, digest


def update(folder: Path, site: str, tensors: Tensors, dtype: Dtype = "float32") -> tuple[Path, UploadManifest]:
    return folder / site, UploadManifest(b"t" * 32, site, 1, (), write_blob(folder / site, tensors, dtype))


def columns(read: Sequence[Tensors], key: str) -> list[list[float]]:
    return [list(column) for column in zip(*(np.asarray(one[key]).ravel().tolist() for one in read), strict=True)]


@settings(max_examples=150, deadline=None)
@given(cohorts(), st.sampled_from(["float32", "bfloat16"]))
def test_the_median_is_the_middle_value_or_the_mean_of_two(cohort: list[Tensors], dtype: Dtype) -> None:
    """Planted bugs: the upper middle value alone for an even number of sites; one turn of the network too few."""
    result, read, _ = merged(cohort, MEDIAN, dtype)

    for key in cohort[0]:
        expected = [np.float32(statistics.median(column)) for column in columns(read, key)]
        assert np.asarray(result[key]).ravel().tolist() == [float(value) for value in expected]


@settings(max_examples=150, deadline=None)
@given(cohorts(), st.sampled_from(["float32", "bfloat16"]), st.sampled_from([0.1, 0.25, 0.34, 0.49]))
def test_the_trimmed_mean_leaves_out_as_many_at_each_end(cohort: list[Tensors], dtype: Dtype, fraction: float) -> None:
    """Planted bugs: one more cut at the upper end; the sum in float32."""
    result, read, _ = merged(cohort, StrategyConfig(rule="trimmed_mean", trim_fraction=fraction), dtype)
    cut = math.floor(fraction * len(cohort) + 1e-9)

    for key in cohort[0]:
        kept = [sorted(column)[cut : len(column) - cut] for column in columns(read, key)]
        expected = np.array([math.fsum(column) / len(column) for column in kept])
        error = np.abs(np.asarray(result[key], np.float64).ravel() - expected)
        scale = np.array([max(abs(number) for number in column) for column in kept])
        assert (error <= 2**-24 * np.abs(expected) + 1e-14 * scale + 1e-45).all()


@settings(max_examples=100, deadline=None)
@given(cohorts(), st.sampled_from([MEDIAN, TRIMMED]), st.integers(1, 40), st.randoms(use_true_random=False))
def test_bits_depend_neither_on_slices_nor_on_arrival_nor_on_who_sent_what(
    cohort: list[Tensors], strategy: StrategyConfig, slice_values: int, random: object
) -> None:
    """Planted bugs: zeros of both signs sorted as they are; rows added in the order of the sites' names."""
    swapped = list(cohort)
    random.shuffle(swapped)  # type: ignore[attr-defined]

    first = merged(cohort, strategy)[2]

    assert merged(cohort, strategy, slice_values=slice_values, turn=len(cohort) // 2)[2] == first
    assert merged(swapped, strategy)[2] == first


def test_one_site_is_its_own_median_and_of_two_it_is_the_mean() -> None:
    one, two = np.array([[1.0, -3.0]], np.float32), np.array([[1.0, -3.0], [2.0, 5.0]], np.float32)

    assert median(one.copy()).tolist() == trimmed_mean(one.copy(), 0).tolist() == [1.0, -3.0]
    assert median(two.copy()).tolist() == trimmed_mean(two.copy(), 0).tolist() == [1.5, 1.0]


def test_what_is_cut_is_counted_as_written() -> None:
    """0.29 * 100 is 28.999999999999996 in floats. Planted bug: floats."""
    cut = {
        (fraction, n): StrategyConfig(trim_fraction=fraction).trimmed(n) for fraction in (0.29, 0.34) for n in (3, 100)
    }

    assert cut == {(0.29, 3): 0, (0.29, 100): 29, (0.34, 3): 1, (0.34, 100): 34}


def test_a_rate_steps_from_the_base_towards_the_median() -> None:
    base = {"w": np.array([10.0], np.float32)}
    cohort = [{"w": np.array([value], np.float32)} for value in (4.0, 6.0, 1e9)]

    result, _, _ = merged(cohort, StrategyConfig(rule="median", server_learning_rate=0.5), base=base)

    assert np.asarray(result["w"]).tolist() == [8.0]


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed_mean"])
def test_a_site_that_flips_and_amplifies_its_update_moves_the_mean_alone(rule: str) -> None:
    """Seven sites move a model by 0.1 in a common direction, a little apart; an eighth sends -100 times that.

    Planted bug: the mean under the median's name.
    """
    rng = np.random.default_rng(3)
    base, step = rng.normal(size=2000), rng.normal(size=2000) * 0.1
    honest = [{"w": (base + step + rng.normal(size=2000) * 0.02).astype(np.float32)} for _ in range(7)]
    poisoned = {"w": (base - 100 * step).astype(np.float32)}
    strategy = StrategyConfig.model_validate({"rule": rule})

    result, _, _ = merged([*honest, poisoned], strategy, base={"w": base.astype(np.float32)})

    got = np.asarray(result["w"], np.float64)
    inside = np.stack([np.asarray(one["w"]) for one in honest])
    error = float(np.linalg.norm(got - base - step) / np.linalg.norm(step))
    if rule == "mean":
        assert error > 10.0
    else:
        assert error < 0.15
        assert ((got >= inside.min(axis=0)) & (got <= inside.max(axis=0))).all()


@pytest.mark.parametrize(
    ("strategy", "sites", "values"),
    [(MEDIAN, 8, 16 << 20), (TRIMMED, 8, 16 << 20), (BOUND, 8, 16 << 20), (MEDIAN, 300, 1 << 18)],
)
def test_memory_grows_neither_with_the_model_nor_with_the_sites(
    tmp_path: Path, strategy: StrategyConfig, sites: int, values: int
) -> None:
    """8 sites of 67 MB, 300 of 1 MB. Planted bugs: slices as long as the mean's; a whole tensor read by either pass."""
    path, manifest = update(tmp_path, "a", {"w": np.random.default_rng(2).normal(size=values).astype(np.float32)})
    updates = [(path, UploadManifest(b"t" * 32, f"s{i:03}", 1, (), manifest.blob)) for i in range(sites)]

    tracemalloc.start()
    merge_models(updates, (path, manifest.blob), strategy, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 24e6


def lengths(folder: Path, wanted: Mapping[str, float]) -> list[tuple[Path, UploadManifest]]:
    """Updates whose distance from a model of zeros is what is wanted: 3-4-5 triangles over two tensors."""
    side = {site: np.float32(length / 5) for site, length in wanted.items()}
    return [
        update(folder, site, {"a": np.array([3 * one, 0], np.float32), "b": np.array([-4 * one], np.float32)})
        for site, one in side.items()
    ]


def zeros(folder: Path) -> tuple[Path, BlobManifest]:
    return folder / "base", write_blob(folder / "base", {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)})


def test_an_update_beyond_the_bound_is_refused_with_its_figures(tmp_path: Path) -> None:
    """Planted bugs: the distance over the last tensor only; squares of the weights, not of the change."""
    updates = lengths(tmp_path, {"a": 5.0, "b": 10.0, "c": 160.0, "d": 20.0, "e": 2.5})

    with pytest.raises(UpdateError) as caught:
        merge_models(updates, zeros(tmp_path), BOUND, tmp_path / "out")

    assert caught.value.site == "c"
    assert str(caught.value) == (
        "site c: its update lies 160 from the model, but at most 30 counts: "
        "strategy.max_norm_ratio = 3 times 10, the median of 5 sites"
    )
    assert not (tmp_path / "out").exists()


def test_an_update_at_the_bound_counts(tmp_path: Path) -> None:
    """Planted bug: a bound that is a little lower."""
    updates = lengths(tmp_path, {"a": 5.0, "b": 5.0, "c": 15.0})

    manifest = merge_models(updates, zeros(tmp_path), BOUND, tmp_path / "out")

    assert np.asarray(read_blob(tmp_path / "out", manifest)["a"]).tolist() == [5.0, 0.0]


def test_a_small_update_of_large_weights_is_no_outlier(tmp_path: Path) -> None:
    base = {"w": np.full(10, 1e6, np.float32)}
    cohort = [{"w": np.full(10, 1e6 + change, np.float32)} for change in (1.0, 1.5, -2.0)]

    result, _, _ = merged(cohort, BOUND, base=base)
    assert np.isfinite(np.asarray(result["w"])).all()
    with pytest.raises(UpdateError, match="site s02"):
        merged([*cohort[:2], {"w": np.full(10, 1e6 - 64, np.float32)}], BOUND, base=base)


def test_the_farthest_goes_first_until_those_left_bear_each_other_out() -> None:
    """Planted bug: the first by name that lies beyond the bound."""
    distances = {"a": 10.0, "b": 40.0, "c": 1.0, "d": 1.0, "e": 1.1}
    out = []

    while far := outlier(distances, 3.0):
        out.append(far[0])
        del distances[far[0]]

    assert out == ["b", "a"]
    assert list(distances) == ["c", "d", "e"]


def test_of_fewer_than_three_updates_none_is_an_outlier() -> None:
    """Planted bug: two are enough."""
    assert outlier({"a": 1.0, "b": 1000.0}, 1.0) is None
    assert outlier({"a": 1.0}, 1.0) is None
    assert outlier({"a": 0.0, "b": 0.0, "c": 0.0}, 1.0) is None


def test_of_equals_the_first_by_name_goes() -> None:
    """Planted bug: the first that came."""
    assert outlier({"d": 9.0, "b": 9.0, "a": 1.0, "c": 1.0, "e": 1.0}, 2.0) == ("b", 1.0)
