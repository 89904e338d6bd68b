"""A study's page: complete, self-contained, true to what there is, and plain about what there is not."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fedoap.cli import cli
from fedoap.errors import ConfigError
from fedoap.report.pictures import write_picture
from fedoap.report.results import CaseFigures, EvaluationFile, Figures
from fedoap.report.study import write_study_markdown, write_study_report
from fedoap.report.study_rows import read_tables
from fedoap.report.study_scores import Study
from invented_study import HEADS, Invented, write_study, write_table

FULL = Invented(
    {
        "local": 0.0,
        "fedavg": 0.01,
        "fedprox": 0.02,
        "fedoap": {"brain": 0.06, "breast": 0.06, "lung": 0.1},
        "fedoap-no-bank": {"brain": 0.0, "breast": 0.06},
        "pooled": {"brain": 0.08, "breast": 0.08, "kidney": 0.0},
    },
    images=1,
    unseen="lung",
    sizes=(3, 6),
)
SECTIONS = (
    "Scores on test cases",
    "Paired differences",
    "Pooling as the upper bound",
    "Ablations",
    "Unseen sites",
    "Dice against training-set size",
    "Stages",
    "Course and cost",
    "Settings that were searched",
    "Data",
    "How the figures are made",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), FULL)


@pytest.fixture(scope="module")
def markdown(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study_markdown(folder, tmp_path_factory.mktemp("docs"))


def test_a_page_holds_every_section_and_needs_nothing_from_outside(folder: Path) -> None:
    """Planted bug: a font from a server."""
    page = _page(folder)

    assert tuple(re.findall("<h2>(.*?)</h2>", page)) == ("In short", *SECTIONS)
    assert page.count("<svg") == 6
    named = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', page)
    assert [url for url in named if not url.startswith(("#", "data:"))] == []
    assert not re.search(r"<script|@import|<link", page)


def test_the_page_says_what_was_planted(markdown: Path) -> None:
    """Planted bug: rows without their verdicts."""
    text = markdown.read_text()

    assert re.search(r"Dice of fedoap minus local, mean over sites: \+0\.0[34]\d .*: better\.", text)
    _, brain, breast, kidney = _cells(text, "Dice: difference to local", "fedoap")
    assert brain.startswith("+0.0")
    assert "better" in brain
    assert "better" in breast
    assert "tied" in kidney
    assert "worse" in _cells(text, "Dice: difference to fedoap ", "fedoap-no-bank")[1]


def test_where_pooling_gains_nothing_the_page_says_so(markdown: Path) -> None:
    """Planted bug: a share of a gain that is none."""
    text = markdown.read_text()

    assert re.findall(r"At (\w+) pooling all cases gains nothing .* No federation can be expected to\.", text) == [
        "kidney"
    ]
    _, brain, _, kidney = _cells(text, "Share of pooling's gain", "fedoap")
    assert 50 < int(brain.split(" %")[0]) < 110
    assert kidney == "–"  # noqa: RUF001


def test_data_splits_budget_seeds_and_versions_are_stated(markdown: Path) -> None:
    text = markdown.read_text()

    assert "Cross-validation by patient, 5 folds (0, 1, 2, 3, 4)" in text
    assert "Seeds: 0." in text
    assert "Gradient steps at each site: 300." in text
    assert "Made with fedoap 0.1.0, torch 2.13.0." in text
    assert "| kidney | kidney | 9 to 10 | 12 | 12 |" in text
    assert "| lung (unseen) | lung | 40 | 8 | 8 |" in text
    assert "30 of 30 runs done" in text


def test_the_search_is_stated_with_its_budget_and_choice(markdown: Path) -> None:
    """Planted bugs: the chosen trial's row without its score; test cases of other folds said to have played no part."""
    text = markdown.read_text()

    assert "Each of 6 variants had 2 trials, judged on validation cases alone" in text
    assert "The test cases of this fold played no part; those of other folds trained and validated" in text
    cells = _cells(text, "Chosen", "fedavg")
    assert cells == ["2", '{"federation.training.learning_rate": 0.002}', "0.510", "0.500 to 0.510"]


def test_markdown_s_figures_lie_beside_it_and_hold_no_page_colour(markdown: Path) -> None:
    """Planted bug: `currentColor`, which is black in a picture."""
    links = re.findall(r"\]\((.+?)\)", markdown.read_text())

    assert len(links) == 6
    assert all("currentColor" not in (markdown.parent / link).read_text() for link in links)


def test_the_same_tables_make_the_same_files(folder: Path, markdown: Path, tmp_path: Path) -> None:
    """Planted bug: names of an SVG's parts drawn anew each time."""
    again = write_study_markdown(folder, tmp_path)

    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert len(names) == 7
    assert all((tmp_path / name).read_bytes() == (markdown.parent / name).read_bytes() for name in names)
    assert again.name == "invented.md"


def test_missing_runs_are_counted_and_named(tmp_path: Path) -> None:
    """Planted bug: the runs of a variant that has begun are all that there should be."""
    study = Invented({"local": 0.0, "fedavg": 0.0}, folds=3, images=1, without=[("fedavg", 1), ("fedavg", 2)])

    text = _text(tmp_path, study)

    assert "4 of 6 runs done" in text
    assert "Missing of fedavg: fold 1 seed 0, fold 2 seed 0." in text
    assert "| fedavg (1 of 3 runs) |" in text


def test_one_run_of_one_site_and_one_variant_makes_a_page(tmp_path: Path) -> None:
    """Planted bug: an interval of one value."""
    text = _text(tmp_path, Invented({"fedavg": 0.0}, patients={"brain": 1}, folds=0, images=1))

    assert "One split: every run is tested on the same cases." in text
    assert "One run: no interval over runs." in text
    assert "No variant is named local" in text
    assert "There is no federated baseline." not in text
    assert "mean over sites" not in _table(text, "Dice (higher is better), mean over runs")
    assert "±" not in _table(text, "Dice (higher is better), mean over patients")
    assert "nan" not in text
    assert "One run: no interval over runs." in _page(tmp_path)


def test_two_variants_with_the_same_figures_are_tied(tmp_path: Path) -> None:
    """Planted bug: zero differences given to the test as they are."""
    write_study(tmp_path, Invented({"local": 0.0}, folds=0, images=1))
    tables = read_tables(tmp_path)
    head = HEADS["cases"].split(",")
    rows = [[getattr(row, name) for name in head] for row in tables.cases]
    write_table(tmp_path / "cases.csv", head, [*rows, *([row[0], "fedavg", *row[2:]] for row in rows)])

    text = write_study_markdown(tmp_path, tmp_path).read_text()

    assert _cells(text, "Dice: difference to local", "fedavg")[1] == "0.000 ± 0.000<br>tied, p = 1.000, n = 30"


def test_a_distance_that_is_never_defined_is_said_and_not_drawn(tmp_path: Path) -> None:
    text = _text(tmp_path, Invented({"local": 0.0, "fedavg": 0.0}, folds=0, images=1, hd95=False))

    assert "HD95 (mm, or pixels) is not defined in any case." in text
    assert "**HD95" not in text
    assert "nan" not in text


def test_a_distance_that_is_sometimes_not_defined_is_counted(markdown: Path) -> None:
    assert re.search(r"Not defined in \d+ of \d+ cases, which are left out", markdown.read_text())


def test_cases_alone_make_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    write_study(tmp_path, Invented({"local": 0.0, "fedavg": 0.0}, folds=0, images=1))
    for name in ("rounds", "runs", "tuning"):
        (tmp_path / f"{name}.csv").unlink()

    text = write_study_markdown(tmp_path, tmp_path).read_text()

    assert "rounds.csv is missing or empty" in text
    assert "The budget of steps is not known." in text
    assert "Course and cost" not in text


def test_a_study_without_a_finished_model_is_named(tmp_path: Path) -> None:
    """Planted bug: the first of no columns."""
    head = HEADS["cases"].split(",")
    write_table(
        tmp_path / "cases.csv",
        head,
        [["s", "local", 0, 0, "lung", "lung", "unseen", "tuned", 0, 0, 8, 0.5, 0.4, "", 0.6]],
    )

    with pytest.raises(ConfigError, match=r"cases\.csv: holds no test case at stage final"):
        write_study_report(tmp_path, tmp_path / "report.html")


def test_unequal_budgets_are_said(tmp_path: Path) -> None:
    write_study(tmp_path, Invented({"local": 0.0, "fedavg": 0.0}, folds=0, images=1))
    rows = [["invented", name, 0, 0, steps, 1.0, 1, "2", "0"] for name, steps in (("local", 300), ("fedavg", 600))]
    write_table(tmp_path / "runs.csv", HEADS["runs"].split(","), rows)

    text = write_study_markdown(tmp_path, tmp_path).read_text()

    assert "Gradient steps at each site: 300, 600. They differ between variants" in text


def test_names_are_escaped(tmp_path: Path) -> None:
    """Planted bugs: a template without autoescape; Markdown without its filter."""
    write_study(tmp_path, Invented({"local": 0.0}, folds=0, images=1))
    row = ["invented", "local", 0, 0, 300, 1.0, 1, "2<script>alert(1)</script>", "0|1"]
    write_table(tmp_path / "runs.csv", HEADS["runs"].split(","), [row])

    assert "<script" not in _page(tmp_path)
    text = write_study_markdown(tmp_path, tmp_path).read_text()
    assert r"0\|1, torch 2\<script>" in text


def test_pictures_are_of_the_worst_the_median_and_the_best_case_and_never_in_markdown(tmp_path: Path) -> None:
    """Planted bugs: the first three; runs with fewer cases; an ablation whose name goes on like a run's."""
    write_study(tmp_path, replace(FULL, gains={"fedoap": 0.0}, unseen="", sizes=()))
    for fold, dices in enumerate(([0.9, 0.2], [0.5, 0.6, 0.1])):
        _pictures(tmp_path / "runs" / f"fedoap-f{fold}-s0" / "evaluation", dices)
    for other in ("fedavg-f0-s0", "fedoap-f0-s0-brain6", "fedoap-fast-f0-s0"):
        _pictures(tmp_path / "runs" / other / "evaluation", [0.0, 1.0])

    page = _page(tmp_path)

    assert re.findall("<figcaption>(worst|median|best): Dice (.*?)<", page) == [
        ("worst", "0.100"),
        ("median", "0.500"),
        ("best", "0.900"),
    ]
    assert "patient-" not in page
    write_study_markdown(tmp_path, tmp_path / "docs")
    assert {path.suffix for path in (tmp_path / "docs").rglob("*.*")} == {".md", ".svg"}


def test_the_command_knows_a_study_s_folder(tmp_path: Path) -> None:
    """Planted bug: `results.json` is looked for first."""
    write_study(tmp_path / "s", Invented({"local": 0.0, "fedavg": 0.0}, folds=0, images=1))

    said = CliRunner().invoke(cli, ["report", str(tmp_path / "s")])
    docs = CliRunner().invoke(cli, ["report", str(tmp_path / "s"), "--markdown", str(tmp_path / "docs")])

    assert said.output == f"{tmp_path / 's' / 'report.html'}\n"
    assert "<h1>Study invented</h1>" in (tmp_path / "s" / "report.html").read_text()
    assert docs.output == f"{tmp_path / 'docs' / 'invented.md'}\n"


@pytest.mark.parametrize(
    ("more", "expected"),
    [([], "holds no cases.csv"), (["-o", "page.html"], "give either --output or --markdown")],
)
def test_markdown_of_what_is_no_study_is_refused(tmp_path: Path, more: list[str], expected: str) -> None:
    said = CliRunner().invoke(cli, ["report", str(tmp_path), "--markdown", str(tmp_path / "docs"), *more])

    assert said.exit_code == 2
    assert expected in said.output


def test_sizes_are_columns_of_the_site_that_was_cut(markdown: Path) -> None:
    """Planted bug: a size's rows counted with all cases."""
    text = markdown.read_text()

    assert "| variant | 3 | 6 | all |" in text
    small, middle, whole = _cells(text, "Dice at kidney by training cases", "local")
    assert float(small[:5]) < float(middle[:5]) < float(whole[:5])
    assert whole == _cells(text, "Dice (higher", "local")[3].removesuffix("<br>tied") + "<br>10 cases"


def test_a_variant_cut_by_name_is_a_point_of_its_twin_s_curve(tmp_path: Path) -> None:
    """Planted bug: each name a curve of its own."""
    write_study(tmp_path, Invented({"local": 0.0, "fedavg": 0.0}, folds=0, images=1))
    head = HEADS["cases"].split(",")
    rows = [[getattr(row, name) for name in head] for row in read_tables(tmp_path).cases]
    small = [[row[0], "fedavg-n3", *row[2:]] for row in rows if row[1] == "fedavg" and row[4] == "kidney"]
    for row in small:
        row[head.index("training_cases")] = 3
    whole = [[*row[: head.index("training_cases")], 9, *row[head.index("dice") :]] for row in rows]
    write_table(tmp_path / "cases.csv", head, [*whole, *small])

    text = write_study_markdown(tmp_path, tmp_path).read_text()

    three, every = _cells(text, "Dice at kidney by training cases", "fedavg")
    assert every == f"{three}<br>9 cases"
    assert "fedavg-n3" not in text


def test_of_many_variants_figures_show_those_that_the_others_are_held_against(tmp_path: Path) -> None:
    """Planted bug: seventeen dots a site."""
    gains = {f"method-{n}": 0.01 * n for n in range(9)} | {"local": 0.0, "fedoap": 0.1, "pooled": 0.1}

    found = Study(read_tables(write_study(tmp_path, Invented(gains, folds=0, images=1))))

    assert found.drawn == ("local", "method-8", "fedoap", "pooled")


def _page(folder: Path) -> str:
    write_study_report(folder, folder / "report.html")
    return (folder / "report.html").read_text()


def _text(folder: Path, study: Invented) -> str:
    return write_study_markdown(write_study(folder, study), folder / "docs").read_text()


def _table(text: str, title: str) -> str:
    return text.split(f"**{title}", 1)[1].split("\n\n", 2)[1]


def _cells(text: str, title: str, name: str) -> list[str]:
    row = next(line for line in _table(text, title).splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip().replace("**", "") for cell in row.split("|")[2:-1]]


def _pictures(folder: Path, dices: list[float]) -> None:
    cases = tuple(
        CaseFigures(name=f"patient-{i}", dice=dice, iou=0.5, hd95=1.0, nsd=0.5) for i, dice in enumerate(dices)
    )
    for place in range(len(dices)):
        write_picture(folder / "brain" / f"{place:02}.png", np.zeros((1, 8, 8)), [np.ones((8, 8), bool)] * 2)
    found = EvaluationFile(
        site="brain",
        split="test",
        path="personal",
        unit="mm",
        tolerance=2.0,
        grid="file",
        mean=Figures(dice=0.5, iou=0.5, hd95=1.0, nsd=0.5),
        cases=cases,
    )
    (folder / "brain.json").write_text(found.model_dump_json())
