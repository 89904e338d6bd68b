"""What is committed names no patient and no machine, and holds no image: not in a page, not in a table."""

import csv
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from fedoap.study.table import COLUMNS

ROOT = Path(__file__).parents[1]
IMAGES = {
    "PNG": b"\x89PNG\r\n",
    "JPEG": b"\xff\xd8\xff",
    "TIFF": b"II*\x00",
    "TIFF, the other way round": b"MM\x00*",
    "gzip, as .nii.gz": b"\x1f\x8b\x08",
    "zip, as .npz": b"PK\x03\x04",
    "NumPy": b"\x93NUMPY",
}
"""How files begin."""
MAGIC_WITHIN = {"DICOM": (128, b"DICM"), "NIfTI": (344, b"n+1\x00"), "NIfTI, of two files": (344, b"ni1\x00")}
INLINE = re.compile(r"data:image/(?!svg)[a-z.+-]+;base64,[A-Za-z0-9+/=]{40}")
"""A picture within a page."""
PATIENTS = re.compile(
    r"TCGA[-_][A-Z0-9]{2}[-_]\d{4}|LIDC[-_]IDRI[-_]\d{4}|kits_\d{5}|case_\d{5}|msd\d\d_\d{3}|\bIMD\d{3}\b|\bISIC_\d{7}"
    r"|\bcvc_\d{3}\b|\b(benign|malignant)[_ ]\(?\d+\)?"
)
"""What public collections of tumours call patients and images."""
ABSOLUTE = re.compile(r"(?:(?<=[\s\"'(=,;>`])|^)(/(home|root|Users|work|tmp|mnt|media|data|srv|scratch)/|[A-Z]:\\)\S")
"""A place on somebody's machine."""
FIGURES = ("docs/results/", "examples/")
"""Folders whose files were made from runs, or point to images."""
NUMBERS = ("case", "patient")


def test_no_committed_file_is_an_image_or_holds_one() -> None:
    """Planted bugs: a PNG under another name; a page with a picture within."""
    found = [f"{name}: {kind}" for name, data in committed() for kind in image_kinds(data)]

    assert found == []


def test_no_committed_figure_names_a_patient_or_a_machine() -> None:
    """Planted bugs: a patient's name in a results page; a path in an example."""
    found = [
        f"{name}: {text}"
        for name, data in committed()
        if name.startswith(FIGURES) or name.endswith((".csv", ".json", ".jsonl"))
        for text in names(data.decode("utf-8", "replace"))
    ]

    assert found == []


def test_committed_tables_of_a_study_know_cases_by_number() -> None:
    """Planted bug: an image's name in the column `case`."""
    found = [
        f"{name}: {text}"
        for name, data in committed()
        if name.endswith(".csv")
        for text in named_cases(data.decode("utf-8"))
    ]

    assert found == []


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (b"\x89PNG\r\n\x1a\n....", ["PNG"]),
        (b"\0" * 128 + b"DICM", ["DICOM"]),
        (b'<img src="data:image/png;base64,' + b"A" * 60 + b'">', ["a picture within"]),
        (b'<img src="data:image/svg+xml;base64,' + b"A" * 60 + b'">', []),
        (b"# A page", []),
    ],
)
def test_an_image_is_known_by_its_content(data: bytes, kinds: list[str]) -> None:
    assert list(image_kinds(data)) == kinds


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the worst is TCGA_CS_4941 again", ["TCGA_CS_4941"]),
        ("see /root/runs/cases.csv", ["/r"]),
        ("path,/home/ann/brain.json", ["/h"]),
        ("fedoap study --data /path/to/tumours https://arxiv.org/home/x", []),
        ("a/tmp/b and case 12", []),
    ],
)
def test_a_name_is_known_by_its_form(text: str, found: list[str]) -> None:
    assert [each[:2] if each.startswith("/") else each for each in names(text)] == found


def test_a_case_is_known_by_its_column() -> None:
    head = ",".join(COLUMNS["cases.csv"])
    row = "s,v,0,0,brain,brain,test,final,{},3,10,0.5,0.4,2.0,0.9"

    assert list(named_cases(f"{head}\n{row.format(7)}\n")) == []
    assert list(named_cases(f"{head}\n{row.format('a7')}\n")) == ["line 2: case is a7"]


def committed() -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of every file that git tracks, or would."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("not a checkout")
    for name in sorted(set(done.stdout.splitlines())):
        if (ROOT / name).is_file():
            yield name, (ROOT / name).read_bytes()


def image_kinds(data: bytes) -> Iterator[str]:
    """Yield the kinds of image that a file's content is or holds."""
    yield from (kind for kind, start in IMAGES.items() if data.startswith(start))
    yield from (kind for kind, (at, magic) in MAGIC_WITHIN.items() if data[at : at + len(magic)] == magic)
    if INLINE.search(data.decode("utf-8", "replace")):
        yield "a picture within"


def names(text: str) -> Iterable[str]:
    """Return what in a text names a patient or a place on a machine."""
    return [found.group().strip() for pattern in (PATIENTS, ABSOLUTE) for found in pattern.finditer(text)]


def named_cases(text: str) -> Iterator[str]:
    """Yield the cells of a table that should be numbers of cases and patients, and are not."""
    for line, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        yield from (f"line {line}: {key} is {row[key]}" for key in NUMBERS if key in row and not row[key].isdigit())
