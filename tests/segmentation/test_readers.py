"""Files of every kind -> arrays in standard order, and masks back to files."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from fedoap.errors import DataError
from fedoap.segmentation.datalist import Case
from fedoap.segmentation.geometry import Grid
from fedoap.segmentation.readers import Volume, read_image, read_label, write_mask

GREY = np.arange(12 * 8, dtype=np.uint8).reshape(12, 8)
MASK = (GREY > 60).astype(np.uint8)
SPACING = (2.0, 3.0, 4.0)


def case(image: Path | tuple[Path, ...], label: Path | None = None) -> Case:
    return Case(image, label, patient="p", name="c1")


def picture(path: Path, values: NDArray[np.generic]) -> Path:
    Image.fromarray(np.asarray(values)).save(path)
    return path


def nifti(path: Path, values: NDArray[np.generic], affine: NDArray[np.float64] | None = None) -> Path:
    place = np.diag((*SPACING, 1.0)) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(np.asarray(values), place), path)
    return path


def series(folder: Path, volume: NDArray[np.int16], *, uids: Sequence[str] = (), start: float = 0.0) -> Path:
    """One DICOM file for each slice of (slices, rows, columns), in Hounsfield units."""
    folder.mkdir()
    uid = generate_uid()
    for index, rows in enumerate(volume):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        part = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        part.SOPClassUID, part.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        part.SeriesInstanceUID = uids[index] if uids else uid
        part.Modality, part.InstanceNumber = "CT", index + 1
        part.Rows, part.Columns = rows.shape
        part.PixelSpacing, part.SliceThickness = [0.5, 0.7], 2.5
        part.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        part.ImagePositionPatient = [-10.0, -20.0, start + 2.5 * index]
        part.SamplesPerPixel, part.PhotometricInterpretation = 1, "MONOCHROME2"
        part.BitsAllocated, part.BitsStored, part.HighBit, part.PixelRepresentation = 16, 16, 15, 1
        part.RescaleSlope, part.RescaleIntercept = 1, -1024
        part.PixelData = (rows + 1024).astype("<i2").tobytes()
        # the files' order on disk is not the slices'
        pydicom.dcmwrite(folder / f"{(index * 7) % 10}-{index}.dcm", part)
    return folder


def read(path: Path, dimensions: int = 2, channels: int = 1) -> Volume:
    return read_image(case(path), None, channels, dimensions)


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_a_picture_is_read_rows_first(tmp_path: Path, ending: str) -> None:
    volume = read(picture(tmp_path / f"a.{ending}", GREY))

    np.testing.assert_array_equal(volume.values, GREY[None].astype(np.float32))
    assert volume.grid.spacing_mm is None


def test_a_jpeg_is_read_as_closely_as_it_was_kept(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.jpg", quality=100)

    assert np.abs(read(tmp_path / "a.jpg").values[0] - GREY).max() < 4


def test_a_tiff_of_several_pages_is_refused(tmp_path: Path) -> None:
    """Planted bug: the first page taken for the whole of a volume."""
    pages = [Image.fromarray(GREY), Image.fromarray(GREY[::-1])]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])

    with pytest.raises(DataError, match=r"case c1: .*a.tif holds 2 pages, but a picture must hold one"):
        read(tmp_path / "a.tif")


def test_sixteen_bits_stay_sixteen(tmp_path: Path) -> None:
    volume = read(picture(tmp_path / "a.png", GREY.astype(np.uint16) * 600))

    assert volume.values.max() == 95 * 600


def test_colour_becomes_grey_for_a_network_of_one_channel(tmp_path: Path) -> None:
    colour = np.stack([GREY, GREY[::-1], GREY * 2], axis=-1)
    path = picture(tmp_path / "a.png", colour)

    np.testing.assert_allclose(read(path).values[0], colour @ np.array([0.299, 0.587, 0.114]), atol=1e-3)
    assert read(path, channels=3).values.shape == (3, 12, 8)


def test_grey_is_repeated_for_a_network_of_three_channels(tmp_path: Path) -> None:
    assert read(picture(tmp_path / "a.png", GREY), channels=3).values.shape == (3, 12, 8)


def test_channels_are_chosen_by_number(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", np.stack([GREY, GREY[::-1], GREY * 2], axis=-1))

    np.testing.assert_array_equal(read_image(case(path), (2,), 1, 2).values[0], GREY * 2)
    with pytest.raises(DataError, match=r"case c1: data.channels is \(3,\), but the image has 3 channels"):
        read_image(case(path), (3,), 1, 2)


def test_several_files_are_channels_in_their_order(tmp_path: Path) -> None:
    paths = (picture(tmp_path / "a.png", GREY), picture(tmp_path / "b.png", GREY[::-1]))

    volume = read_image(case(paths), None, 2, 2)

    np.testing.assert_array_equal(volume.values, np.stack([GREY, GREY[::-1]]))


def test_channels_of_different_shapes_are_refused(tmp_path: Path) -> None:
    paths = (picture(tmp_path / "a.png", GREY), picture(tmp_path / "b.png", GREY[1:]))

    with pytest.raises(DataError, match=r"case c1: .*b.png is 11 x 8, but its first channel 12 x 8"):
        read_image(case(paths), None, 2, 2)


def test_channels_stored_in_other_directions_are_turned_to_the_first(tmp_path: Path) -> None:
    """Planted bug: shapes compared as the files have them, by which a channel with other axes is refused."""
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    turned = np.zeros((4, 4))
    turned[[0, 1, 2, 3], [2, 0, 1, 3]] = *SPACING, 1.0  # columns: anterior, superior, right
    paths = nifti(tmp_path / "t1.nii", values), nifti(tmp_path / "t2.nii", values.transpose(1, 2, 0), turned)

    volume = read_image(case(paths), None, 2, 3)

    np.testing.assert_array_equal(volume.values, np.stack([values, values]))


@pytest.mark.parametrize("channel", ["moved", "turned"])
def test_a_channel_that_lies_elsewhere_is_refused(tmp_path: Path, channel: str) -> None:
    """Planted bug: shapes compared and places not, by which a channel shows other tissue than its mask marks."""
    values = np.arange(27, dtype=np.float32).reshape(3, 3, 3)
    place = np.diag((*SPACING, 1.0))
    if channel == "moved":
        place[0, 3] = SPACING[0]
    else:  # mirrored about the corner, not about the middle
        place[0, 0] *= -1
    paths = nifti(tmp_path / "t1.nii", values), nifti(tmp_path / "t2.nii", values, place)

    with pytest.raises(DataError, match=r"case c1: .*t2.nii lies elsewhere than its first channel, by its affine"):
        read_image(case(paths), None, 2, 3)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_nifti_is_turned_to_right_anterior_superior(
    tmp_path: Path, order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    """Seen failing with the flips applied to the file's axes instead of the standard ones."""
    standard = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    stored = np.flip(standard, tuple(axis for axis, sign in enumerate(signs) if sign < 0)).transpose(order)
    affine = np.eye(4)
    affine[:3, :3] = (np.diag(SPACING) @ np.diag(signs))[:, list(order)]

    volume = read(nifti(tmp_path / "a.nii", stored, affine), dimensions=3)

    np.testing.assert_array_equal(volume.values[0], standard)
    assert volume.grid.spacing_mm == pytest.approx(SPACING)
    np.testing.assert_array_equal(volume.grid.to_file(standard), stored)


def test_a_slice_kept_as_nifti_lies_like_a_picture(tmp_path: Path) -> None:
    volume = read(nifti(tmp_path / "a.nii.gz", GREY.T[:, :, None]))

    np.testing.assert_array_equal(volume.values[0], GREY)
    assert volume.grid.spacing_mm == (3.0, 2.0)
    assert volume.grid.to_file(GREY).shape == (8, 12, 1)


def test_a_fourth_axis_of_nifti_holds_channels(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 4 * 2, dtype=np.float32).reshape(2, 3, 4, 2)

    assert read(nifti(tmp_path / "a.nii", values), dimensions=3, channels=2).values.shape == (2, 2, 3, 4)


def test_a_volume_is_refused_by_a_network_of_two_dimensions(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.arange(24, dtype=np.float32).reshape(2, 3, 4))

    with pytest.raises(DataError, match=r"case c1: image is 2 x 3 x 4, but network.dimensions is 2"):
        read(path)


def test_a_picture_is_refused_by_a_network_of_three_dimensions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"case c1: image is 12 x 8, but network.dimensions is 3"):
        read(picture(tmp_path / "a.png", GREY), dimensions=3)


def test_a_dicom_series_is_stacked_in_hounsfield_units(tmp_path: Path) -> None:
    hounsfield = (np.arange(3 * 5 * 4).reshape(3, 5, 4) - 30).astype(np.int16)

    volume = read(series(tmp_path / "ct", hounsfield), dimensions=3)

    # rows run to posterior and columns to left; the standard order runs right, anterior, superior
    np.testing.assert_array_equal(volume.values[0], hounsfield[:, ::-1, ::-1].transpose(2, 1, 0))
    assert volume.grid.spacing_mm == pytest.approx((0.7, 0.5, 2.5))


def test_one_dicom_file_is_a_picture_of_known_spacing(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", GREY.astype(np.int16)[None])

    volume = read(next(folder.iterdir()))

    np.testing.assert_array_equal(volume.values[0], GREY)
    assert volume.grid.spacing_mm == pytest.approx((0.5, 0.7))


def test_two_series_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", np.zeros((2, 4, 4), np.int16), uids=[generate_uid(), generate_uid()])

    with pytest.raises(DataError, match=r"case c1: .*ct holds 2 DICOM series, but must hold one"):
        read(folder, dimensions=3)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ct").mkdir()

    with pytest.raises(DataError, match=r"case c1: .*ct is not readable as dicom"):
        read(tmp_path / "ct", dimensions=3)


@pytest.mark.parametrize("name", ["a.png", "a.nii.gz", "a.nii", "a.dcm", "a.tif"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not an image\n at all" * 30)

    with pytest.raises(DataError, match=f"case c1: .*{name} is not readable as") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", np.random.default_rng(0).normal(size=(16, 16, 1)))
    path.write_bytes(path.read_bytes()[:-900])

    with pytest.raises(DataError, match=r"case c1: .*a.nii.gz is not readable as nifti"):
        read(path)


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mha").write_bytes(b"")

    with pytest.raises(DataError, match=r"a.mha: unknown ending"):
        read(tmp_path / "a.mha")


@pytest.mark.parametrize(
    ("values", "text"), [(GREY * 0 + 7, "only the value 7"), (MASK * 255, "like a mask; are image")]
)
def test_an_image_that_shows_nothing_or_a_mask_is_refused(tmp_path: Path, values: NDArray[np.uint8], text: str) -> None:
    with pytest.raises(DataError, match=rf"case c1: image .*a.png holds .*{text}"):
        read(picture(tmp_path / "a.png", values))


def test_an_image_with_a_voxel_that_is_no_number_is_refused(tmp_path: Path) -> None:
    values = np.ones((4, 4, 1), np.float32)
    values[0, 0] = np.nan

    with pytest.raises(DataError, match=r"case c1: image .* has 1 voxels that are not finite"):
        read(nifti(tmp_path / "a.nii", values))


@pytest.mark.parametrize("top", [1, 255])
def test_a_mask_of_either_scale_becomes_zeros_and_ones(tmp_path: Path, top: int) -> None:
    label = picture(tmp_path / "m.png", MASK * top)

    volume = read_label(case(tmp_path / "a.png", label), grid_of(tmp_path), 2)

    np.testing.assert_array_equal(volume.values, MASK[None].astype(np.float32))


def test_masks_of_one_bit_a_palette_or_three_equal_channels_are_read(tmp_path: Path) -> None:
    whole = Image.fromarray(MASK * 255)
    whole.convert("1").save(tmp_path / "bit.png")
    whole.convert("RGB").save(tmp_path / "rgb.png")
    palette = Image.fromarray(MASK, mode="L").convert("P")
    palette.putdata(MASK.ravel().tolist())
    palette.putpalette([0, 0, 0, 200, 30, 30])
    palette.save(tmp_path / "palette.png")

    for name in ("bit.png", "rgb.png", "palette.png"):
        found = read_label(case(tmp_path / "a.png", tmp_path / name), grid_of(tmp_path), 2)
        np.testing.assert_array_equal(found.values[0], MASK)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (GREY, "holds 96 values from 0 to 95, .*are image and label swapped"),
        (MASK * 2, "holds 2 values from 0 to 2"),
        (MASK[1:], "label is 11 x 8, but its image 12 x 8"),
        (MASK * 0 + 255, "marks every voxel"),
        (np.stack([MASK * 255, MASK * 0, MASK * 0], axis=-1), "is coloured"),
    ],
)
def test_a_mask_that_is_none_is_refused(tmp_path: Path, values: NDArray[np.uint8], text: str) -> None:
    label = picture(tmp_path / "m.png", values)

    with pytest.raises(DataError, match=rf"case c1: .*{text}"):
        read_label(case(tmp_path / "a.png", label), grid_of(tmp_path), 2)


def test_an_empty_mask_is_a_case_without_a_lesion(tmp_path: Path) -> None:
    label = picture(tmp_path / "m.png", MASK * 0)

    assert not read_label(case(tmp_path / "a.png", label), grid_of(tmp_path), 2).values.any()


def test_a_mask_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    image = read(nifti(tmp_path / "a.nii", np.arange(24, dtype=np.float32).reshape(2, 3, 4)), dimensions=3)
    moved = np.diag((*SPACING, 1.0))
    moved[0, 3] = 1.0
    label = nifti(tmp_path / "m.nii", (np.arange(24) > 20).astype(np.uint8).reshape(2, 3, 4), moved)

    with pytest.raises(DataError, match=r"case c1: label lies elsewhere"):
        read_label(case(tmp_path / "a.nii", label), image.grid, 3)


def test_a_mask_in_another_orientation_is_turned_to_its_image(tmp_path: Path) -> None:
    mask = (np.arange(24) > 20).astype(np.uint8).reshape(2, 3, 4)
    image = read(nifti(tmp_path / "a.nii", np.arange(24, dtype=np.float32).reshape(2, 3, 4)), dimensions=3)
    mirrored = np.diag((-SPACING[0], *SPACING[1:], 1.0))
    mirrored[0, 3] = SPACING[0]
    label = nifti(tmp_path / "m.nii", mask[::-1], mirrored)

    found = read_label(case(tmp_path / "a.nii", label), image.grid, 3)

    np.testing.assert_array_equal(found.values[0], mask)


def test_a_mask_written_as_nifti_has_its_images_shape_and_place(tmp_path: Path) -> None:
    affine = np.array([[0, -2.0, 0, 30], [3.0, 0, 0, -5], [0, 0, 4.0, 7], [0, 0, 0, 1]])
    volume = read(nifti(tmp_path / "a.nii.gz", np.arange(24, dtype=np.float32).reshape(2, 3, 4), affine), dimensions=3)
    mask = (np.arange(24) > 12).astype(np.uint8).reshape(2, 3, 4)

    write_mask(tmp_path / "out.nii.gz", mask, volume.grid)

    written = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), mask)
    np.testing.assert_array_equal(written.affine, affine)


def test_a_mask_of_a_picture_is_written_as_one(tmp_path: Path) -> None:
    write_mask(tmp_path / "out.png", MASK, grid_of(tmp_path))

    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), MASK * 255)


def test_a_mask_of_a_volume_is_no_picture(tmp_path: Path) -> None:
    volume = read(nifti(tmp_path / "a.nii", np.arange(24, dtype=np.float32).reshape(2, 3, 4)), dimensions=3)

    with pytest.raises(DataError, match=r"out.png: the mask is 2 x 3 x 4, but a picture has two dimensions"):
        write_mask(tmp_path / "out.png", np.zeros((2, 3, 4), np.uint8), volume.grid)


def test_a_mask_is_not_written_as_dicom(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"out.dcm: a mask is written as .png"):
        write_mask(tmp_path / "out.dcm", MASK, grid_of(tmp_path))


def grid_of(folder: Path) -> Grid:
    return read(picture(folder / "a.png", GREY)).grid
