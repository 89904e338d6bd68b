"""Files -> arrays in standard order, through MONAI's readers; masks -> files.

PNG, TIFF, JPEG and BMP go through Pillow, NIfTI through nibabel, a DICOM file or the folder of one
series through pydicom. MONAI is imported when the first file is read, so a run whose cases are all cached
does not wait for it. C stands for channels, S for the spatial axes.
"""

# ruff: noqa: PLC0415

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedoap.errors import DataError, StorageError
from fedoap.segmentation.datalist import Case
from fedoap.segmentation.geometry import Floats, Grid

Format: TypeAlias = Literal["picture", "nifti", "dicom"]
PICTURES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
NIFTI = (".nii", ".nii.gz")
LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's
CORNER_TOLERANCE = 0.1
"""Voxels by which a corner of a label, or of a further channel, may lie off the image's."""


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """An image or mask in standard order, and the grid that it came from."""

    values: Floats
    """(C, *S)"""
    grid: Grid


def format_of(path: Path) -> Format:
    """Return the format that a file or folder is read as.

    Raises:
        DataError: no reader knows its ending.
    """
    name = path.name.lower()
    if path.is_dir() or name.endswith((".dcm", ".dicom", ".ima")):
        return "dicom"
    if name.endswith(NIFTI):
        return "nifti"
    if name.endswith(PICTURES):
        return "picture"
    if not path.suffix and _has_dicom_magic(path):
        return "dicom"
    raise DataError(f"{path}: unknown ending, but must be one of {', '.join(PICTURES + NIFTI)}, .dcm or a DICOM folder")


def read_image(case: Case, channels: tuple[int, ...] | None, in_channels: int, dimensions: int) -> Volume:
    """Return a case's image with the network's number of channels.

    Args:
        case: Several files are one channel each.
        channels: Those to take; all where not given. Colour becomes grey for a network of one channel.
        in_channels: What the network takes.
        dimensions: 2 or 3.

    Raises:
        DataError: a file is unreadable, of another shape or place than the first, or shows nothing.
    """
    parts = [_read(path, dimensions, case) for path in case.images]
    first = parts[0]
    for path, part in zip(case.images, parts, strict=True):
        if part.grid.standard_shape != first.grid.standard_shape:
            ours, theirs = _by(part.grid.standard_shape), _by(first.grid.standard_shape)
            raise DataError(f"case {case.name}: {path} is {ours}, but its first channel {theirs}")
        if not _same_place(part.grid, first.grid):
            raise DataError(f"case {case.name}: {path} lies elsewhere than its first channel, by its affine")
    values = np.concatenate([part.values for part in parts])
    _check_image(values, case)
    return Volume(_chosen(values, channels, in_channels, case), first.grid)


def read_label(case: Case, image: Grid, dimensions: int) -> Volume:
    """Return a case's mask as zeros and ones on the image's grid.

    Raises:
        DataError: the file is unreadable, of another shape or place, or no mask.
    """
    assert case.label is not None
    volume = _read(case.label, dimensions, case, mask=True)
    if volume.grid.standard_shape != image.standard_shape:
        ours, theirs = _by(volume.grid.standard_shape), _by(image.standard_shape)
        raise DataError(f"case {case.name}: label is {ours}, but its image {theirs}: {case.label}")
    if not _same_place(volume.grid, image):
        raise DataError(f"case {case.name}: label lies elsewhere than its image, by the affine of {case.label}")
    return Volume(_binary(volume.values, case), image)


def write_mask(path: Path, mask: NDArray[np.uint8], grid: Grid) -> None:
    """Write a mask of the file's grid: 0 and 255 as a picture, 0 and 1 with the image's affine as NIfTI.

    Raises:
        DataError: the ending is neither, or the mask has three dimensions and the file two.
        StorageError: the disk refused.
    """
    name = path.name.lower()
    try:
        if name.endswith(NIFTI):
            _write_nifti(path, mask, grid)
        elif name.endswith((".png", ".tif", ".tiff", ".bmp")):
            _write_picture(path, mask, grid)
        else:
            raise DataError(f"{path}: a mask is written as .png, .tif, .bmp, .nii or .nii.gz")
    except OSError as error:
        raise StorageError(f"{path}: mask cannot be written: {error.strerror or error}") from None


def _read(path: Path, dimensions: int, case: Case, *, mask: bool = False) -> Volume:
    kind = format_of(path)
    try:
        with warnings.catch_warnings():
            # a series that MONAI would have to guess about is refused; missing orientation is handled below
            warnings.filterwarnings("error", message="the list contains|slice: |Failed to read")
            warnings.filterwarnings("ignore", message="PydicomReader: ImageOrientationPatient")
            match kind:
                case "picture":
                    return _picture(path, dimensions, mask=mask)
                case "nifti":
                    return _nifti(path, dimensions)
                case "dicom":
                    return _dicom(path, dimensions)
    except DataError as error:
        raise DataError(f"case {case.name}: {error}") from None
    except Exception as error:  # noqa: BLE001 - on a damaged file three libraries raise what they like
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"case {case.name}: {path} is not readable as {kind}: {text}") from None


def _picture(path: Path, dimensions: int, *, mask: bool) -> Volume:
    from monai.data.image_reader import PILReader
    from PIL.Image import Image

    def plain(image: Image) -> Image:
        pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1  # a JPEG's second may be its preview
        if pages > 1:
            image.close()
            raise DataError(
                f"{path} holds {pages} pages, but a picture must hold one; volumes are read as NIfTI or DICOM"
            )
        # a palette's indices are what a mask means; an image means the palette's colours
        if image.mode in ("1", "LA", "CMYK", "YCbCr", "HSV", "LAB", "PA"):
            return image.convert("L" if image.mode in ("1", "LA") else "RGB")
        return image.convert("RGB") if image.mode in ("P", "RGBA") and not mask else image

    reader = PILReader(converter=plain, reverse_indexing=False)
    array = np.asarray(reader.get_data(reader.read(path))[0], dtype=np.float32)
    return _volume(array[..., None] if array.ndim == 2 else array, array.shape[:2], None, dimensions)


def _nifti(path: Path, dimensions: int) -> Volume:
    from monai.data.image_reader import NibabelReader

    reader = NibabelReader()
    array, meta = reader.get_data(reader.read(path))
    values = np.asarray(array, dtype=np.float32)
    spatial = values.shape[:3]
    values = values.reshape(*spatial, -1) if values.ndim > 3 else values[..., None]
    affine = np.asarray(meta["original_affine"], dtype=np.float64)
    return _volume(values, spatial, affine, dimensions)


def _dicom(path: Path, dimensions: int) -> Volume:
    from monai.data.image_reader import PydicomReader

    reader = PydicomReader()
    read = reader.read(path)
    slices = read if isinstance(read, list) else [read]
    series = {str(getattr(part, "SeriesInstanceUID", "")) for part in slices}
    if len(series) > 1:
        raise DataError(f"{path} holds {len(series)} DICOM series, but must hold one")
    array, _meta = reader.get_data(read)
    values = np.asarray(array, dtype=np.float32)
    coloured = int(getattr(slices[0], "SamplesPerPixel", 1)) > 1
    values = values if coloured else values[..., None]
    placed = hasattr(slices[0], "ImageOrientationPatient") and hasattr(slices[0], "ImagePositionPatient")
    affine = np.asarray(_meta["original_affine"], dtype=np.float64) if placed else None
    return _volume(values, values.shape[:-1], affine, dimensions)


def _volume(values: Floats, spatial: tuple[int, ...], affine: NDArray[np.float64] | None, dimensions: int) -> Volume:
    """Return values (*S, C) of a file in standard order, as (C, *S)."""
    shape = spatial[:dimensions]
    if len(shape) < dimensions or any(n != 1 for n in spatial[dimensions:]):
        raise DataError(f"image is {_by(spatial)}, but network.dimensions is {dimensions}")
    axes, flips = _standard_order(affine, dimensions)
    spacing = None if affine is None else tuple(float(n) for n in np.linalg.norm(affine[:3, :dimensions], axis=0))
    if spacing is not None and not all(0 < n < np.inf for n in spacing):
        raise DataError(f"voxel spacing is {spacing}, but must be positive")
    grid = Grid(
        shape=shape,
        file_shape=tuple(spatial),
        axes=axes,
        flips=flips,
        affine=None if affine is None else tuple(float(n) for n in affine.ravel()),
        spacing_mm=None if spacing is None else tuple(spacing[axis] for axis in axes),
    )
    channels_first = np.moveaxis(values.reshape(*shape, values.shape[-1]), -1, 0)
    return Volume(np.ascontiguousarray(grid.to_standard(channels_first), dtype=np.float32), grid)


def _standard_order(affine: NDArray[np.float64] | None, dimensions: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    if affine is None:
        return tuple(range(dimensions)), (False,) * dimensions
    if dimensions == 2:  # nibabel and pydicom count columns first, a picture rows
        return (1, 0), (False, False)
    from nibabel.orientations import io_orientation

    order = np.asarray(io_orientation(affine))
    axes = [int(np.flatnonzero(order[:, 0] == target)[0]) for target in range(3)]
    return tuple(axes), tuple(bool(order[axis, 1] < 0) for axis in axes)


def _chosen(values: Floats, channels: tuple[int, ...] | None, in_channels: int, case: Case) -> Floats:
    if channels is not None:
        if max(channels) >= len(values) or min(channels) < 0:
            raise DataError(f"case {case.name}: data.channels is {channels}, but the image has {len(values)} channels")
        values = values[list(channels)]
    if len(values) == in_channels:
        return values
    if in_channels == 1 and len(values) == 3:
        return np.tensordot(LUMINANCE, values, axes=1)[None]
    if len(values) == 1:
        return np.repeat(values, in_channels, axis=0)
    raise DataError(
        f"case {case.name}: image has {len(values)} channels, but network.in_channels is {in_channels}; "
        "choose with data.channels"
    )


def _check_image(values: Floats, case: Case) -> None:
    where = f"case {case.name}: image {case.images[0]}"
    if not np.isfinite(values).all():
        raise DataError(f"{where} has {int((~np.isfinite(values)).sum())} voxels that are not finite numbers")
    found = np.unique(values[0])[:3] if values.shape[0] == 1 or (values == values[:1]).all() else None
    if found is None or len(found) > 2:
        return
    if len(found) == 1:
        raise DataError(f"{where} holds only the value {found[0]:g}, but must show something")
    if found[0] == 0 and found[1] in (1, 255):
        raise DataError(f"{where} holds only the values 0 and {found[1]:g}, like a mask; are image and label swapped?")


def _binary(values: Floats, case: Case) -> Floats:
    where = f"case {case.name}: label {case.label}"
    mask = values[:1]
    colours = values[:3]  # a fourth channel is opacity
    if not (colours == mask).all():
        raise DataError(f"{where} is coloured, but a mask has one channel of 0 and 1, or 0 and 255")
    found = np.unique(mask)
    if not (np.isin(found, (0, 1)).all() or np.isin(found, (0, 255)).all()):
        span = f"{len(found)} values from {found[0]:g} to {found[-1]:g}"
        raise DataError(f"{where} holds {span}, but must hold 0 and 1, or 0 and 255; are image and label swapped?")
    if found[0] != 0:
        raise DataError(f"{where} marks every voxel, but a mask must leave some out")
    return (mask > 0).astype(np.float32)


def _same_place(part: Grid, image: Grid) -> bool:
    if part.affine is None or image.affine is None:
        return True
    ours, theirs = _standard_affine(part), _standard_affine(image)
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in (*image.standard_shape, 1, 1)[:3]])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    offset = np.linalg.norm(((ours - theirs) @ corners)[:3], axis=0).max()
    return bool(offset <= CORNER_TOLERANCE * min(image.spacing_mm or (1.0,)))


def _standard_affine(grid: Grid) -> NDArray[np.float64]:
    assert grid.affine is not None
    affine = np.reshape(grid.affine, (4, 4)).astype(np.float64)
    turn = np.eye(4)
    n = len(grid.axes)
    turn[:n, :n] = 0
    for target, (axis, flip) in enumerate(zip(grid.axes, grid.flips, strict=True)):
        turn[axis, target] = -1.0 if flip else 1.0
        turn[axis, 3] = grid.shape[axis] - 1 if flip else 0.0
    return np.asarray(affine @ turn)


def _write_nifti(path: Path, mask: NDArray[np.uint8], grid: Grid) -> None:
    import nibabel

    # without an affine the file was a picture: rows first, where NIfTI counts columns first
    array = mask if grid.affine is not None else mask.T[..., None]
    affine = np.eye(4) if grid.affine is None else np.reshape(grid.affine, (4, 4))
    image = nibabel.Nifti1Image(array.astype(np.uint8), affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def _write_picture(path: Path, mask: NDArray[np.uint8], grid: Grid) -> None:
    from PIL import Image

    if len(grid.axes) != 2:
        raise DataError(f"{path}: the mask is {_by(grid.shape)}, but a picture has two dimensions; write .nii.gz")
    rows_first = mask.reshape(grid.shape).transpose(grid.axes)
    Image.fromarray((rows_first * 255).astype(np.uint8)).save(path)


def _has_dicom_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
