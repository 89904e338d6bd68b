"""Datalists -> cases; every fault is one line that names the case and the list."""

import json
from pathlib import Path

import pytest

from fedoap.config import SiteData
from fedoap.errors import DataError
from fedoap.segmentation.datalist import SPLITS, Case, case_of, load_datalist, load_splits, stem


def write(folder: Path, lists: object, *, without: str = "") -> SiteData:
    """A datalist and an empty file for each path in it but one."""
    (folder / "list.json").write_text(json.dumps(lists))
    for rows in lists.values() if isinstance(lists, dict) else ():
        for row in rows if isinstance(rows, list) else ():
            for key in ("image", "label"):
                paths = row.get(key) if isinstance(row, dict) else row
                for path in paths if isinstance(paths, list) else [paths]:
                    if isinstance(path, str) and path != without:
                        (folder / path).touch()
    return SiteData(datalist=folder / "list.json")


def row(name: str, **more: object) -> dict[str, object]:
    return {"image": f"{name}.png", "label": f"{name}-mask.png", **more}


def test_paths_start_at_the_lists_folder_and_patients_are_texts(tmp_path: Path) -> None:
    data = write(tmp_path, {"training": [row("a", patient=7)]})

    (case,) = load_datalist(data, "training")

    assert case == Case(tmp_path / "a.png", tmp_path / "a-mask.png", patient="7", name="a")


def test_paths_start_at_the_root_where_one_is_given(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    data = write(tmp_path, {"training": []})
    write(tmp_path / "images", {"training": [row("a")]})
    (tmp_path / "list.json").write_text(json.dumps({"training": [row("a")]}))

    (case,) = load_datalist(data.model_copy(update={"root": tmp_path / "images"}), "training")

    assert case.image == tmp_path / "images" / "a.png"


def test_unknown_keys_are_other_programs_business(tmp_path: Path) -> None:
    data = write(tmp_path, {"name": "Task", "tensorImageSize": "3D", "test": [row("a", fold=3)]})

    assert len(load_datalist(data, "test")) == 1


def test_a_patient_without_a_name_is_called_after_the_file(tmp_path: Path) -> None:
    data = write(tmp_path, {"test": [{"image": "scan.1.nii.gz", "label": "m.nii.gz"}]})

    (case,) = load_datalist(data, "test")

    assert (case.patient, case.name) == ("scan.1", "scan.1")


def test_several_files_are_one_image(tmp_path: Path) -> None:
    data = write(tmp_path, {"test": [{"image": ["t1.nii", "t2.nii"], "label": "m.nii"}]})

    (case,) = load_datalist(data, "test")

    assert case.images == (tmp_path / "t1.nii", tmp_path / "t2.nii")


def test_all_three_lists_come_of_one_reading(tmp_path: Path) -> None:
    data = write(tmp_path, {"training": [row("a"), row("b")], "validation": [row("c")], "test": [row("d")]})
    data = data.model_copy(update={"max_training_cases": 1})

    assert load_splits(data) == tuple(load_datalist(data, split) for split in SPLITS)


def test_an_empty_list_is_named_where_all_three_are_wanted(tmp_path: Path) -> None:
    data = write(tmp_path, {"training": [row("a")], "validation": [], "test": [row("d")]})

    with pytest.raises(DataError, match=r"validation is empty, but must list at least one case"):
        load_splits(data)


def test_a_plain_path_is_a_case_for_prediction(tmp_path: Path) -> None:
    data = write(tmp_path, {"test": ["a.nii.gz"], "training": [row("b")]})

    (case,) = load_datalist(data, "test", labelled=False)

    assert case.label is None
    assert len(load_datalist(data, "training")) == 1


def test_only_the_first_training_cases_are_used_where_a_limit_is_set(tmp_path: Path) -> None:
    rows = [row("a"), row("b"), row("c")]
    data = write(tmp_path, {"training": rows[:2], "test": rows[2:]}).model_copy(update={"max_training_cases": 1})

    assert [case.name for case in load_datalist(data, "training")] == ["a"]
    assert [case.name for case in load_datalist(data, "test")] == ["c"]


@pytest.mark.parametrize(
    ("lists", "text"),
    [
        ([], "holds a list, but a datalist is an object"),
        ({"training": {}}, "training is an object, but must be a list"),
        ({"training": [3]}, r"training\[0\]: is 3, but a case is an object"),
        ({"training": [{"label": "m.png"}]}, r"training\[0\]: image is missing"),
        ({"training": [{"image": []}]}, "image is a list, but must be a path"),
        ({"training": [{"image": "a.png", "label": 5}]}, "label is 5, but must be a path"),
        ({"training": [], "test": [row("a")]}, "training is empty"),
        ({"test": [row("a")]}, "training is empty"),
        ({"training": [{"image": "a.png"}]}, "case a: label is missing in training of .*list.json"),
        ({"training": [{"image": "a.png", "label": "a.png"}]}, "case a: label and image are the same file"),
    ],
)
def test_a_list_of_another_form_is_refused(tmp_path: Path, lists: object, text: str) -> None:
    data = write(tmp_path, lists)

    with pytest.raises(DataError, match=text):
        load_datalist(data, "training")


@pytest.mark.parametrize("text", ["{", "\udc80", "[" * 100_000], ids=["open", "bytes", "deep"])
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    """Planted bug: the parser's `RecursionError` let through."""
    (tmp_path / "list.json").write_text(text, errors="surrogateescape")

    with pytest.raises(DataError, match=r"list.json: not a JSON datalist"):
        load_datalist(SiteData(datalist=tmp_path / "list.json"), "test")


def test_a_datalist_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json: no such datalist"):
        load_datalist(SiteData(datalist=tmp_path / "none.json"), "test")


@pytest.mark.parametrize("missing", ["b.png", "b-mask.png"])
def test_a_missing_file_of_any_split_names_its_case(tmp_path: Path, missing: str) -> None:
    data = write(tmp_path, {"training": [row("a")], "test": [row("b")]}, without=missing)

    with pytest.raises(DataError, match=rf"case b: (image|label) .*{missing} does not exist, but test of .*list.json"):
        load_datalist(data, "training")


def test_a_patient_in_two_splits_names_both_cases(tmp_path: Path) -> None:
    data = write(tmp_path, {"training": [row("a", patient="p")], "test": [row("b", patient="p")]})

    with pytest.raises(DataError, match="case b: patient p is in test and, with case a, in training"):
        load_datalist(data, "training")


def test_an_image_in_two_splits_is_refused_though_the_patients_differ(tmp_path: Path) -> None:
    data = write(tmp_path, {"validation": [row("a", patient="p")], "test": [row("a", patient="q")]})

    with pytest.raises(DataError, match=r"case a: image .*a.png is in test and, with case a, in validation"):
        load_datalist(data, "test")


def test_one_channel_of_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    """Planted bug: the files of an image compared all together."""
    one = {"image": ["a.png", "b.png"], "label": "m.png", "patient": "p"}
    two = {"image": ["c.png", "b.png"], "label": "n.png", "patient": "q"}
    data = write(tmp_path, {"training": [one], "test": [two]})

    with pytest.raises(DataError, match=r"case c: image .*b.png is in test and, with case a, in training"):
        load_datalist(data, "test")


def test_a_patient_may_have_several_cases_in_one_split(tmp_path: Path) -> None:
    data = write(tmp_path, {"training": [row("a", patient="p"), row("b", patient="p")]})

    assert len(load_datalist(data, "training")) == 2


def test_every_error_is_one_line(tmp_path: Path) -> None:
    data = write(tmp_path, {"training": [row("a")]}, without="a.png")

    with pytest.raises(DataError) as caught:
        load_datalist(data, "training")

    assert "\n" not in str(caught.value)


def test_an_image_outside_any_list_is_a_case(tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").touch()

    assert case_of(tmp_path / "x.nii.gz").name == "x"
    with pytest.raises(DataError, match=r"y.png: no such file"):
        case_of(tmp_path / "y.png")


def test_a_stem_has_no_endings() -> None:
    assert [stem(Path(name)) for name in ("a.nii.gz", "a.png", "series")] == ["a", "a", "series"]


def test_dicom_series_named_by_their_uids_are_different_patients() -> None:
    """Planted bug: the last number of a UID taken for an ending, by which all series of a study are one patient."""
    uids = ["1.2.840.113619.2.55.3.1", "1.2.840.113619.2.55.3.2"]

    assert [stem(Path("ct") / uid) for uid in uids] == uids
