"""A MONAI/Decathlon datalist -> cases, checked before any image is opened.

The list is a JSON object with the lists `training`, `validation` and `test`; an item is an object with
`image` (one path, or one for each channel), `label` and, optionally, `patient` and `name`, or just
an image's path. Other keys, in the list and in its items, are for other programs and are ignored.
Every fault is a `DataError` of one line that names the case and the file that lists it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from fedoap.config import SiteData
from fedoap.errors import DataError

Split: TypeAlias = Literal["training", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
COMPRESSED = (".gz", ".bz2")


@dataclass(frozen=True, slots=True)
class Case:
    """One image, or one file for each of its channels, and its mask; a DICOM series is its folder."""

    image: Path | tuple[Path, ...]
    label: Path | None
    patient: str
    name: str

    @property
    def images(self) -> tuple[Path, ...]:
        """The image's files, one or one for each channel."""
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file or folder that the case is made of."""
        return self.images if self.label is None else (*self.images, self.label)


def load_datalist(data: SiteData, split: Split, *, labelled: bool = True) -> tuple[Case, ...]:
    """Return the cases of one split; the files of all splits exist and no patient is in two of them.

    Args:
        data: The site's datalist, root folder and, for `training`, the most cases to use.
        split: The list wanted.
        labelled: False accepts cases without a mask, for prediction.

    Raises:
        DataError: the list cannot be read, names a missing file, has a patient or an image in two
            splits, or the split is empty or lacks a mask.
    """
    (cases,) = _load(data, (split,), labelled=labelled)
    return cases


def load_splits(data: SiteData) -> tuple[tuple[Case, ...], tuple[Case, ...], tuple[Case, ...]]:
    """Return the labelled cases of training, validation and test; the list is read and checked once.

    Raises:
        DataError: as for `load_datalist`, of any of the three.
    """
    training, validation, test = _load(data, SPLITS, labelled=True)
    return training, validation, test


def load_all(data: SiteData) -> tuple[tuple[Split, Case], ...]:
    """Return the labelled cases of all three lists, one list after the other, each with its list; some may be empty.

    Raises:
        DataError: as for `load_datalist`, or all three are empty.
    """
    place, splits = data.datalist, _listed(data)
    if not any(splits.values()):
        raise DataError(f"{place}: {', '.join(SPLITS)} are empty, but must list at least one case")
    _check_files(splits, place)
    _check_apart(splits, place)
    for name, cases in splits.items():
        _check_labels(cases, name, place)
    return tuple((name, case) for name, cases in splits.items() for case in cases)


def check_form(data: SiteData) -> None:
    """Return if the site's file is a datalist with at least one case; whether images exist is not looked at.

    Raises:
        DataError: it cannot be read, is no datalist, or lists nothing.
    """
    if not any(_listed(data).values()):
        raise DataError(f"{data.datalist}: {', '.join(SPLITS)} are empty or missing, but must list at least one case")


def case_of(image: Path, label: Path | None = None) -> Case:
    """Return the case that one image, outside any list, makes.

    Raises:
        DataError: a file does not exist.
    """
    case = Case(image, label, patient=stem(image), name=stem(image))
    for file in case.files:
        if not file.exists():
            raise DataError(f"{file}: no such file")
    return case


def stem(path: Path) -> str:
    """Return a file's name without its endings; a number at the end is none, as in the UID of a DICOM series.

    >>> stem(Path("images/scan.1.nii.gz")), stem(Path("ct/1.2.840.7"))
    ('scan.1', '1.2.840.7')
    """
    inner = path.with_suffix("") if path.suffix in COMPRESSED else path
    return inner.name if inner.suffix[1:].isdigit() else inner.stem


def _load(data: SiteData, wanted: Sequence[Split], *, labelled: bool) -> list[tuple[Case, ...]]:
    place, splits = data.datalist, _listed(data)
    for split in wanted:
        if not splits[split]:
            raise DataError(f"{place}: {split} is empty, but must list at least one case")
    _check_files(splits, place)
    _check_apart(splits, place)
    if labelled:
        for split in wanted:
            _check_labels(splits[split], split, place)
    splits["training"] = splits["training"][: data.max_training_cases]
    return [splits[split] for split in wanted]


def _listed(data: SiteData) -> dict[Split, tuple[Case, ...]]:
    place = data.datalist
    values, root = _read(place), data.root if data.root is not None else place.parent
    return {name: tuple(_cases(values.get(name, []), name, place, root)) for name in SPLITS}


def _read(place: Path) -> Mapping[str, object]:
    try:
        values = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{place}: no such datalist") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: not a JSON datalist: {error}") from None
    except RecursionError:
        raise DataError(f"{place}: not a JSON datalist: is nested too deeply to be read") from None
    if not isinstance(values, dict):
        raise DataError(
            f"{place}: holds {_kind(values)}, but a datalist is an object with the lists {', '.join(SPLITS)}"
        )
    return values


def _cases(rows: object, split: Split, place: Path, root: Path) -> Iterator[Case]:
    if not isinstance(rows, list):
        raise DataError(f"{place}: {split} is {_kind(rows)}, but must be a list of cases")
    for number, row in enumerate(rows):
        yield _case(row, f"{place}: {split}[{number}]", root)


def _case(row: object, where: str, root: Path) -> Case:
    match row:
        case str(image):
            return _built([image], None, {}, where, root)
        case {"image": str(image), **rest}:
            return _built([image], rest.get("label"), rest, where, root)
        case {"image": [_, *_] as images, **rest} if all(isinstance(image, str) for image in images):
            return _built(images, rest.get("label"), rest, where, root)
        case {"image": image}:
            raise DataError(f"{where}: image is {_kind(image)}, but must be a path or a list of paths")
        case dict():
            raise DataError(f"{where}: image is missing")
        case _:
            raise DataError(f"{where}: is {_kind(row)}, but a case is an object with image and label")


def _built(images: Sequence[str], label: object, rest: Mapping[object, object], where: str, root: Path) -> Case:
    if label is not None and not isinstance(label, str):
        raise DataError(f"{where}: label is {_kind(label)}, but must be a path")
    paths = tuple(root / image for image in images)
    name = str(rest.get("name") or stem(paths[0]))
    patient = rest.get("patient")
    return Case(
        image=paths if len(paths) > 1 else paths[0],
        label=root / label if label else None,
        patient=stem(paths[0]) if patient in (None, "") else str(patient),
        name=name,
    )


def _check_files(splits: Mapping[Split, Sequence[Case]], place: Path) -> None:
    for split, cases in splits.items():
        for case in cases:
            for image in case.images:
                if not image.exists():
                    raise DataError(f"case {case.name}: image {image} does not exist, but {split} of {place} lists it")
            if case.label is not None and not case.label.exists():
                raise DataError(f"case {case.name}: label {case.label} does not exist, but {split} of {place} lists it")


def _check_apart(splits: Mapping[Split, Sequence[Case]], place: Path) -> None:
    seen: dict[str, tuple[Split, str]] = {}
    for split, cases in splits.items():
        for case in cases:
            for what in (f"patient {case.patient}", *(f"image {image}" for image in case.images)):
                other, name = seen.setdefault(what, (split, case.name))
                if other != split:
                    raise DataError(
                        f"case {case.name}: {what} is in {split} and, with case {name}, in {other}, "
                        f"but may be in one split only: {place}"
                    )


def _check_labels(cases: Sequence[Case], split: Split, place: Path) -> None:
    for case in cases:
        if case.label is None:
            raise DataError(
                f"case {case.name}: label is missing in {split} of {place}, but only prediction goes without"
            )
        if case.label in case.images:
            raise DataError(f"case {case.name}: label and image are the same file {case.label} in {split} of {place}")


def _kind(value: object) -> str:
    return {"dict": "an object", "list": "a list", "str": "a text", "NoneType": "null"}.get(
        type(value).__name__, f"{value!r}"
    )
