"""Invented patients with tumours, for a demonstration without anybody's data.

Each organ looks as its scanner would show it, with lesions of varying size, shape and contrast: lobed
blobs with a rim and a core, brighter than their tissue in some organs and darker in others. Other
structures are just as bright, so no threshold finds the lesions. Everything follows from the seed.
"""

# ruff: noqa: PLC0415

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from fedoap.errors import DataError, StorageError
from fedoap.segmentation.anatomies import KINDS, Organ
from fedoap.segmentation.datalist import SPLITS, Split
from fedoap.segmentation.shapes import Space, lesion, paint
from fedoap.segmentation.streams import stream

__all__ = ["KINDS", "ORGANS", "Organ", "Phantom", "phantom", "write_phantoms"]

ORGANS: tuple[Organ, ...] = get_args(Organ)
ABOUT = "invented images, not of any patient; may be used for anything"
CASES_PER_PATIENT = 2
SMALLEST = 32
SPACING_MM = (2.0, 2.0, 2.5)
"""Of 3-D phantoms."""


@dataclass(frozen=True, slots=True, eq=False)
class Phantom:
    """One image and its mask, rows first; in 3-D (down, across, along)."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    """0 or 1"""


def write_phantoms(folder: Path, organ: Organ, counts: Mapping[Split, int], size: tuple[int, ...], seed: int) -> Path:
    """Write images, masks and `datalist.json` into a folder, and return the datalist's path.

    Args:
        folder: Created if it is missing.
        organ: One of `ORGANS`; its site should set `KINDS[organ].modality`.
        counts: Cases per split; two make a patient.
        size: Two numbers write PNG, three NIfTI.
        seed: Fixes every voxel.

    Raises:
        DataError: the organ is unknown, the size too small, or the folder holds a datalist that is not of phantoms.
        StorageError: the disk refused.
    """
    if organ not in KINDS:
        raise DataError(f"phantoms: organ is {organ!r}, but must be one of {', '.join(ORGANS)}")
    if len(size) not in (2, 3) or min(size) < SMALLEST:
        raise DataError(f"phantoms: size is {size}, but must be two or three numbers of at least {SMALLEST}")
    path = folder / "datalist.json"
    try:
        if path.exists() and ABOUT not in path.read_text(encoding="utf-8", errors="replace"):
            raise DataError(f"{path}: is not of phantoms, so it is not written over; name another folder")
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "labels").mkdir(exist_ok=True)
        lists: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
        for split, patient, part in _places(counts):
            drawn = phantom(organ, size, seed, patient, part)
            lists[split].append(_written(folder, drawn, f"{organ}-{patient:03d}-{part}", f"{organ}-{patient:03d}"))
        path.write_text(json.dumps(_described(organ, lists), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{folder}: phantoms cannot be written: {error.strerror or error}") from None
    return path


def phantom(organ: Organ, size: tuple[int, ...], seed: int, patient: int, part: int) -> Phantom:
    """Return one image of a patient: the same anatomy in each part, other lesions and other noise."""
    kind, space = KINDS[organ], Space(size)
    anatomy = kind.anatomy(space, stream(seed, f"{organ} patient", patient))
    random = stream(seed, f"{organ} image", patient, part)
    image, marked = anatomy.image, np.zeros(size, dtype=bool)
    lesions = [lesion(space, random, anatomy.tissue, kind.look) for _ in range(random.choice((1, 1, 1, 2)))]
    for one in lesions:
        image = paint(image, one.level, anatomy.grey + one.difference, 0.06)
        marked |= one.level < 1
    image = kind.scanner(space, random, np.clip(image, 0, None), lesions)
    grey = random.uniform(0.8, 1.0) * np.clip(image, 0, 1) ** random.uniform(0.85, 1.15)
    return Phantom(np.round(255 * grey).astype(np.uint8), marked.astype(np.uint8))


def _places(counts: Mapping[Split, int]) -> Iterator[tuple[Split, int, int]]:
    patient = 0
    for split in SPLITS:
        for number in range(counts.get(split, 0)):
            part = number % CASES_PER_PATIENT
            patient += part == 0
            yield split, patient, part


def _written(folder: Path, drawn: Phantom, name: str, patient: str) -> dict[str, str]:
    ending = "png" if drawn.image.ndim == 2 else "nii.gz"
    paths = {"image": f"images/{name}.{ending}", "label": f"labels/{name}.{ending}"}
    for key, path in paths.items():
        values = drawn.image if key == "image" else drawn.label
        if ending == "png":
            _write_png(folder / path, values * (255 if key == "label" else 1))
        else:
            _write_nifti(folder / path, values)
    return {**paths, "patient": patient}


def _write_png(path: Path, values: NDArray[np.uint8]) -> None:
    from PIL import Image

    Image.fromarray(values).save(path)


def _write_nifti(path: Path, values: NDArray[np.uint8]) -> None:
    import nibabel

    # down is posterior and across is right, while NIfTI's axes run right, anterior, superior
    array = np.ascontiguousarray(values[::-1].transpose(1, 0, 2))
    image = nibabel.Nifti1Image(array, np.diag((*SPACING_MM, 1.0)))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def _described(organ: Organ, lists: Mapping[str, object]) -> dict[str, object]:
    return {"name": f"{organ} phantoms", "description": ABOUT, "labels": {"0": "background", "1": "tumour"}, **lists}
