"""A study's folder -> one page that needs nothing else, or Markdown with its figures beside it."""

import re
from collections.abc import Iterable
from pathlib import Path

from fedoap.errors import ConfigError
from fedoap.report.page import templates
from fedoap.report.study_about import (
    completeness,
    course_section,
    data_section,
    facts,
    methods_section,
    stages_section,
    tuning_section,
)
from fedoap.report.study_charts import dots, looks
from fedoap.report.study_content import Drawing, Section
from fedoap.report.study_findings import (
    ablation_section,
    bound_section,
    differences_section,
    headline,
    unseen_section,
)
from fedoap.report.study_gallery import galleries
from fedoap.report.study_rows import read_tables
from fedoap.report.study_scores import DICE, METRICS, Study
from fedoap.report.study_sizes import sizes_section
from fedoap.report.study_tables import MEAN, columns, score_tables

CASES = "cases.csv"
GREY = "#7d8590"
"""Legible on white and on black: a picture in a Markdown page does not know the colour of the text around it."""


def is_study(folder: Path) -> bool:
    """Return whether a folder holds a study's figures."""
    return (folder / CASES).is_file()


def write_study_report(folder: Path, page: Path) -> None:
    """Write the page of a study as far as it is done; pictures are taken from its runs, if they hold any.

    Raises:
        ConfigError: nothing is done yet, or a table has another form.
    """
    study = _read(folder)
    html = (
        templates()
        .get_template("study.html.j2")
        .render(
            name=study.tables.study,
            facts=facts(study),
            done=completeness(study)[0],
            headline=headline(study),
            sections=sections(study),
            galleries=galleries(folder / "runs", study.roles.main) if study.roles.main else {},
            main=study.roles.main,
        )
    )
    page.write_text(html, encoding="utf-8")


def write_study_markdown(folder: Path, target: Path) -> Path:
    """Write NAME.md, and its figures in NAME/, to another folder; no picture of a case is among them.

    Raises:
        ConfigError: nothing is done yet, or a table has another form.
    """
    study = _read(folder)
    name = study.tables.study
    found = sections(study)
    figures = target / name
    figures.mkdir(parents=True, exist_ok=True)
    for drawing in (each for section in found for each in section.drawings):
        (figures / f"{drawing.name}.svg").write_text(drawing.svg.replace("currentColor", GREY), encoding="utf-8")
    text = (
        templates()
        .get_template("study.md.j2")
        .render(name=name, facts=facts(study), done=completeness(study)[0], headline=headline(study), sections=found)
    )
    page = target / f"{name}.md"
    page.write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")
    return page


def sections(study: Study) -> list[Section]:
    """Return the page's sections, from what was compared to how the figures are made."""
    look = looks(study.roles.everyone)
    found: Iterable[Section | None] = (
        scores_section(study),
        differences_section(study),
        bound_section(study),
        ablation_section(study),
        unseen_section(study),
        sizes_section(study, look),
        stages_section(study),
        course_section(study, look),
        tuning_section(study),
        data_section(study),
        methods_section(),
    )
    return [section for section in found if section]


def scores_section(study: Study) -> Section:
    """Return the scores of each variant at each site."""
    scores, roles = study.final, study.roles
    text = [
        "The best of a column is marked “best” only where it differs significantly from every other row (paired over "
        "patients, corrected for the whole table); otherwise all that cannot be told from it are marked “tied”. "
        "The bound, pooling, takes no part, nor does a variant with missing runs."
    ]
    found = {metric.column: score_tables(scores, roles.compared, roles.rivals, metric) for metric in METRICS}
    text += [f"{metric.label} is not defined in any case." for metric in METRICS if not found[metric.column]]
    places = [site or MEAN for site in columns(scores)]
    shown = [name for name in study.drawn if name in scores.variants]
    series = {name: [scores.over_patients(name, site, DICE) for site in columns(scores)] for name in shown}
    drawing = Drawing(
        "scores",
        "Test Dice, mean over patients with 95 % interval",
        dots(places, series, "Dice", looks(roles.everyone)),
    )
    more = [table for metric in METRICS[1:] for table in found[metric.column]]
    return Section("Scores on test cases", text, found[DICE.column], more, "The same for IoU, HD95 and NSD", [drawing])


def _read(folder: Path) -> Study:
    study = Study(read_tables(folder))
    if not study.final.sites:
        raise ConfigError(
            f"{folder / CASES}: holds no test case at stage final; run the study until a first run is done"
        )
    return study
