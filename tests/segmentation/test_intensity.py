"""What becomes of intensities, for each modality."""

from pathlib import Path

import numpy as np
import pytest

from fedoap.config import SiteData
from fedoap.segmentation.intensity import scaled


def test_standardised_modalities_have_mean_0_and_spread_1_where_they_are_not_zero() -> None:
    values = np.random.default_rng(0).normal(100, 20, (1, 64, 64)).astype(np.float32)
    values[0, :20] = 0

    for modality in ("mr", "ultrasound", "photo"):
        inside = scaled(values, SiteData.model_validate({"datalist": "l", "modality": modality}))[0, 20:]
        assert abs(inside.mean()) < 0.01
        assert abs(inside.std() - 1) < 0.01


def test_the_dark_end_keeps_its_distance_from_the_background_and_the_bright_end_is_clipped() -> None:
    """Planted bugs: values below the 1st percentile lifted to it, the background with them; no clipping."""
    values = np.linspace(500, 600, 1000, dtype=np.float32).reshape(1, 25, 40)
    values[0, 0, :3] = 0, 40, 9000

    found = scaled(values, SiteData(datalist=Path("l"), modality="mr"))[0].ravel()

    assert found[1] - found[0] == pytest.approx(40 * (found[500] - found[400]) / (values.flat[500] - values.flat[400]))
    assert found[2] == found[-1]


@pytest.mark.parametrize(("page", "spot", "side"), [(0, 100, 5), (250, 3, 3)])
def test_an_image_whose_foreground_is_flat_stays_in_range(page: int, spot: int, side: int) -> None:
    """One grey value on black, or a white page with a dark spot. Planted bug: divided by a spread of 1e-6."""
    values = np.full((1, 40, 40), page, np.float32)
    values[0, :side, :side] = spot

    for modality in ("mr", "photo"):
        found = scaled(values, SiteData.model_validate({"datalist": "l", "modality": modality}))
        assert 1 < np.ptp(found) < 50


def test_hounsfield_units_keep_an_absolute_window() -> None:
    values = np.array([[[-1000.0, -100.0, 100.0, 300.0, 2000.0]]], dtype=np.float32)

    np.testing.assert_allclose(scaled(values, SiteData(datalist=Path("l"), modality="ct"))[0, 0], [-2, -2, 0, 2, 2])


def test_a_window_is_the_sites_to_choose() -> None:
    values = np.array([[[0.0, 10.0, 20.0]]], dtype=np.float32)

    found = scaled(values, SiteData(datalist=Path("l"), modality="mr", window=(0.0, 20.0)))

    np.testing.assert_allclose(found[0, 0], [-2, 0, 2])


def test_an_8_bit_export_of_computed_tomography_is_stretched() -> None:
    values = np.linspace(0, 60, 1000, dtype=np.float32).reshape(1, 25, 40)

    found = scaled(values, SiteData(datalist=Path("l"), modality="ct"))

    assert found.min() == -2
    assert found.max() == 2


def test_an_8_bit_export_is_stretched_from_zero_whatever_its_darkest_tissue() -> None:
    """Of 100 to 200 the 99.5th percentile is 199.5. Planted bug: stretched from the 0.5th percentile."""
    values = np.linspace(100, 200, 1001, dtype=np.float32).reshape(1, 7, 143)

    found = scaled(values, SiteData(datalist=Path("l"), modality="ct"))

    assert found.min() == pytest.approx(4 * 100 / 199.5 - 2, abs=1e-5)
