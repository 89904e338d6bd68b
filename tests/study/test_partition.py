"""A hospital's scanner, by arithmetic on images that are known, and the files that it leaves."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedoap.errors import DataError
from fedoap.segmentation.geometry import Floats
from fedoap.segmentation.streams import stream
from fedoap.study.config import Hospital
from fedoap.study.grid import Grid
from fedoap.study.lists import write_lists
from fedoap.study.partition import acquired
from study_files import BASE, write_study

STUDY = """
name = "s"
base = "simulate.toml"
folds = 2
sites = ["a"]
[variants.fedavg.federation.strategy]
name = "fedavg"
[partition.a]
north = { share = 0.5 }
south = { share = 0.5, gamma = 2.0, noise = 0.1 }
"""
STEP: Floats = np.tile(np.repeat(np.array([0.25, 0.75], np.float32), 4), (8, 1))
"""Half dark, half bright, 8 x 8."""


def shown(**settings: float) -> Floats:
    """Return the step as a scanner shows it."""
    return acquired(STEP, Hospital.model_validate({"share": 1} | settings), stream(0, "noise"))


def test_a_scanner_without_a_shift_changes_nothing() -> None:
    np.testing.assert_array_equal(shown(), STEP)


def test_gamma_is_an_exponent() -> None:
    """Planted bug: its inverse."""
    np.testing.assert_allclose(shown(gamma=2.0), STEP**2, atol=1e-6)


def test_contrast_is_about_the_mean() -> None:
    """Planted bug: about zero. 0.5 +- 0.25 becomes 0.5 +- 0.1."""
    np.testing.assert_allclose(shown(contrast=0.4)[0, [0, 7]], [0.4, 0.6], atol=1e-6)


def test_a_quarter_of_the_resolution_leaves_two_pixels_of_eight() -> None:
    """Each is its four's mean, so the dark and the bright half keep their ends. Planted bug: nearest pixels."""
    fine = STEP + np.tile(np.array([0.1, -0.1], np.float32), (8, 4))

    coarse = acquired(fine, Hospital(share=1, resolution=0.25), stream(0, "noise"))

    np.testing.assert_allclose(coarse[:, 0], 0.25, atol=1e-5)
    np.testing.assert_allclose(coarse[:, 7], 0.75, atol=1e-5)
    assert 0.25 < coarse[0, 3] < coarse[0, 4] < 0.75


def test_noise_has_its_sigma_and_is_the_same_again() -> None:
    """Planted bug: noise of the process's own generator."""
    flat = np.full((64, 64), 0.5, np.float32)
    hospital = Hospital(share=1, noise=0.05)

    first, again, other = (acquired(flat, hospital, stream(0, "noise", n)) for n in (1, 1, 2))

    assert abs(float(first.std()) - 0.05) < 0.003
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_colours_are_shifted_alike() -> None:
    colours = np.stack([STEP, STEP, STEP], axis=2)

    found = acquired(colours, Hospital(share=1, gamma=1.5, resolution=0.5), stream(0, "noise"))

    np.testing.assert_array_equal(found[..., 0], found[..., 2])


def test_images_are_written_once_below_the_studys_folder_under_numbers(tmp_path: Path) -> None:
    """Planted bugs: a file named like the original; images written anew each time."""
    draw(tmp_path)
    study = write_study(tmp_path, BASE, STUDY, cases=12)

    lists = write_lists(study, tmp_path / "out")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    again = write_lists(study, tmp_path / "out")

    assert lists == again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")} == written
    rows = [row for split in json.loads(lists.of(0, "south").path.read_text()).values() for row in split]
    assert {row["image"] for row in rows} == {str(path) for path in written}
    assert all(Path(row["image"]).name.startswith(f"{row['name']}-") for row in rows)
    pixels = np.asarray(Image.open(rows[0]["image"]), np.float64) / 255
    assert abs(pixels.mean() - 0.25) < 0.03
    north = [row for split in json.loads(lists.of(0, "north").path.read_text()).values() for row in split]
    assert not {row["patient"] for row in rows} & {row["patient"] for row in north}
    assert all(Path(row["image"]).parent == tmp_path for row in north)


def test_another_scanner_makes_its_sites_runs_anew(tmp_path: Path) -> None:
    """Planted bug: a digest of the cases only."""
    draw(tmp_path)

    digests = set()
    for text in (STUDY, STUDY.replace("2.0", "1.9"), STUDY):
        study = write_study(tmp_path, BASE, text, cases=12)
        (run, *_) = Grid(study, write_lists(study, tmp_path / "out")).runs("fedavg", {})
        digests.add(run.digest)
        assert run.organs["south"] == "a"

    assert len(digests) == 2


def test_only_pictures_have_scanners(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\d+[xy].png: is no picture, but a partition's scanners take"):
        write_lists(write_study(tmp_path, BASE, STUDY), tmp_path / "out")


def draw(folder: Path) -> None:
    """Leave grey pictures where the study's files will be."""
    for number in range(12):
        for part in "xy":
            Image.fromarray(np.full((16, 16), 128, np.uint8)).save(folder / f"a{number}{part}.png")
