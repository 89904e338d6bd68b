"""One organ's patients divided among several hospitals, whose scanners differ.

The images are made once and written below the study's folder, named by number. H and W are an image's rows
and columns; grey levels lie in [0, 1].
"""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedoap.errors import DataError, StorageError
from fedoap.segmentation.datalist import SPLITS
from fedoap.segmentation.geometry import Floats
from fedoap.segmentation.streams import stream
from fedoap.study.config import Hospital
from fedoap.study.folds import Member, dealt

MODES = ("L", "RGB")
"""What PIL calls 8-bit grey and colour."""


def shared_out(
    members: Sequence[Member], hospitals: Mapping[str, Hospital], *, seed: int, by_list: bool
) -> dict[str, tuple[Member, ...]]:
    """Return each hospital's cases; patients beyond the sum of the shares are left out.

    Args:
        members: All cases of the site that is divided.
        hospitals: Their names and shares.
        seed: Fixes who goes where.
        by_list: Divide each list separately, for studies that keep the datalist's own split.
    """
    left = max(0.0, 1 - sum(each.share for each in hospitals.values()))
    shares = [*(each.share for each in hospitals.values()), left]
    places: dict[int, int] = {}
    for part in SPLITS if by_list else ("all",):
        sizes = Counter(member.patient for member in members if part in (member.split, "all"))
        places |= dealt(sizes, shares, seed, f"partition of {part}")
    return {
        name: tuple(member for member in members if places[member.patient] == place)
        for place, name in enumerate(hospitals)
    }


def acquired(grey: Floats, hospital: Hospital, noise: np.random.Generator) -> Floats:
    """Return an image (H, W) or (H, W, 3) as the hospital's scanner shows it.

    First fewer pixels, interpolated to the same grid, then gamma, contrast about the mean, and noise.
    """
    coarse = _coarser(grey, hospital.resolution)
    curved = np.clip(coarse, 0, 1) ** hospital.gamma
    mean = curved.mean(dtype=np.float64)
    image = mean + hospital.contrast * (curved - mean) + noise.normal(0, hospital.noise or 0.0, grey.shape)
    found: Floats = np.clip(image, 0, 1).astype(np.float32)
    return found


def written(members: Sequence[Member], hospital: Hospital, folder: Path, seed: int) -> tuple[Member, ...]:
    """Return the cases with their images as the hospital's scanner shows them, which are written to the folder.

    Raises:
        DataError: an image is not a single 8-bit picture.
        StorageError: the disk refused.
    """
    if hospital == Hospital(share=hospital.share):
        return tuple(members)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tuple(_written(member, hospital, folder, seed) for member in members)
    except OSError as error:
        raise StorageError(f"{folder}: images cannot be written: {error.strerror or error}") from None


def _written(member: Member, hospital: Hospital, folder: Path, seed: int) -> Member:
    from PIL import Image  # noqa: PLC0415 - a study without a partition needs no picture

    source = member.case.image
    # a changed datalist may give the number to another image
    path = folder / f"{member.number}-{hashlib.sha256(member.case.images[0].name.encode()).hexdigest()[:8]}.png"
    if not path.exists():
        grey = _read(source, member.number)
        shifted = acquired(grey, hospital, stream(seed, "noise of an acquisition", member.number))
        part = path.with_suffix(".part")
        Image.fromarray(np.round(255 * shifted).astype(np.uint8)).save(part, format="PNG")
        os.replace(part, path)  # noqa: PTH105 - a picture that is there is whole
    return replace(member, case=replace(member.case, image=path))


def _read(source: Path | tuple[Path, ...], number: int) -> Floats:
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415

    if isinstance(source, tuple):
        raise DataError(f"case {number}: has a file for each channel, but a partition's scanners make pictures of one")
    try:
        with Image.open(source) as image:
            if image.mode not in MODES:
                raise DataError(
                    f"{source}: is {image.mode}, but a partition's scanners take 8-bit grey or RGB pictures"
                )
            return np.asarray(image, dtype=np.float32) / np.float32(255)
    except UnidentifiedImageError:
        raise DataError(f"{source}: is no picture, but a partition's scanners take 8-bit grey or RGB ones") from None


def _coarser(grey: Floats, resolution: float) -> Floats:
    """Return the image averaged to this share of its pixels along each edge, and interpolated back."""
    if resolution == 1:
        return grey
    from PIL import Image  # noqa: PLC0415

    height, width = grey.shape[:2]
    few = max(1, round(width * resolution)), max(1, round(height * resolution))
    channels = [Image.fromarray(channel) for channel in np.moveaxis(np.atleast_3d(grey), 2, 0)]
    resampled: list[Floats] = [
        np.asarray(
            channel.resize(few, Image.Resampling.BOX).resize((width, height), Image.Resampling.BILINEAR), np.float32
        )
        for channel in channels
    ]
    return np.stack(resampled, axis=2, dtype=np.float32).reshape(grey.shape)
