"""How an image is fitted into the network's grid, and what resampling keeps."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedoap.segmentation.geometry import Geometry, Grid, resample, resample_mask

sizes = st.integers(1, 40)


@given(shape=st.tuples(sizes, sizes), size=st.tuples(sizes, sizes), spacing=st.sampled_from([None, (0.5, 2.0)]))
def test_the_whole_image_fits_touches_the_borders_and_keeps_its_aspect(
    shape: tuple[int, int], size: tuple[int, int], spacing: tuple[float, float] | None
) -> None:
    """Seen failing with the larger of the two scales, cut off at the grid's size."""
    grid = Grid(shape, shape, (0, 1), (False, False), spacing_mm=spacing)

    geometry = Geometry.fitted(grid, size, None, ((0, 0), shape))

    assert all(1 <= n <= most for n, most in zip(geometry.content, size, strict=True))
    assert any(n == most for n, most in zip(geometry.content, size, strict=True))
    lengths = [n * step for n, step in zip(shape, spacing or (1.0, 1.0), strict=True)]
    scale = min(n / length for n, length in zip(size, lengths, strict=True))
    assert all(abs(n - max(1, length * scale)) <= 0.5 for n, length in zip(geometry.content, lengths, strict=True))


@given(shape=st.tuples(sizes, sizes), source=st.tuples(sizes, sizes))
def test_resampling_keeps_constants_and_range(shape: tuple[int, int], source: tuple[int, int]) -> None:
    """Seen failing with weights that are not normalised at the borders."""
    values = np.random.default_rng(0).random((1, *source), dtype=np.float32)

    changed = resample(values, shape)

    np.testing.assert_allclose(resample(np.full((1, *source), 3, np.float32), shape), 3, rtol=1e-5)
    assert changed.shape == (1, *shape)
    assert values.min() - 1e-5 <= changed.min() <= changed.max() <= values.max() + 1e-5


def test_resampling_to_half_takes_a_weighted_mean_of_neighbours() -> None:
    values = np.array([[0, 0, 8, 0, 0, 0, 0, 0]], dtype=np.float32)

    # triangle filter of half-width 2 about 0.5, 2.5, 4.5, 6.5: weights 1/8 3/8 3/8 1/8, cut at the border
    np.testing.assert_allclose(resample(values, (4,))[0], [8 / 7, 3, 0, 0], atol=1e-6)


def test_a_lesion_of_one_voxel_survives_shrinking() -> None:
    mask = np.zeros((1, 64, 64), np.float32)
    mask[0, 31, 7] = 1

    assert resample_mask(mask, (8, 8)).sum() == 1
    assert resample_mask(np.zeros((1, 64, 64), np.float32), (8, 8)).sum() == 0
