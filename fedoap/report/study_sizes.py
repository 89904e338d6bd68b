"""Dice against how many training cases a site had, where a study varies that."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedoap.report.statistics import Estimate, mean_interval
from fedoap.report.study_charts import Look, Point, lines
from fedoap.report.study_content import Cell, Drawing, Section, Table, score
from fedoap.report.study_rows import CaseRow, Run
from fedoap.report.study_scores import Study, family, is_cut


@dataclass(frozen=True, slots=True)
class Sizes:
    """One variant at one site: its Dice by number of training cases."""

    cut: Mapping[int, Estimate]
    whole: Estimate | None
    """With all that the site has."""
    cases: float
    """How many that are, on average over runs."""

    @property
    def points(self) -> list[Point]:
        """Both, by size."""
        points = [(float(size), each) for size, each in sorted(self.cut.items())]
        return [*points, (self.cases, self.whole)] if self.whole else points


def sizes_section(study: Study, look: Mapping[str, Look]) -> Section | None:
    """Return the curves and tables of each site that was cut."""
    cut = [row for row in study.tables.cases if is_cut(row, study.most) and row.stage == "final"]
    sites = sorted({row.site for row in cut})
    if not sites:
        return None
    tables, drawings = [], []
    for site in sites:
        found = _by_variant(study, site)
        tables.append(_table(site, found))
        series = {name: each.points for name, each in found.items() if name in study.drawn}
        if series:
            drawings.append(
                Drawing(f"sizes-{site}", f"Test Dice at {site}", lines(series, "training cases", "Dice", look))
            )
    text = ["Only the site named had fewer cases. Mean over runs; ± is half the 95 % t-interval over them."]
    return Section("Dice against training-set size", text, tables, drawings=drawings)


def _by_variant(study: Study, site: str) -> dict[str, Sizes]:
    """Return the variants that were cut at a site, in the page's order."""
    names = study.roles.everyone
    found: dict[str, dict[int | None, list[CaseRow]]] = defaultdict(lambda: defaultdict(list))
    for row in study.tables.cases:
        if row.site == site and row.stage == "final" and row.training_cases is not None:
            cut = is_cut(row, study.most)
            if cut or row.variant not in study.cut:
                found[family(row.variant, names)][row.training_cases if cut else None].append(row)
    ordered = [*(name for name in names if name in found), *sorted(found.keys() - set(names))]
    return {name: _sizes(found[name]) for name in ordered if found[name].keys() - {None}}


def _sizes(rows: Mapping[int | None, Sequence[CaseRow]]) -> Sizes:
    means = {size: mean for size, each in rows.items() if size is not None and (mean := _mean(each))}
    whole = rows.get(None, ())
    counts = {row.run: row.training_cases for row in whole if row.training_cases is not None}
    return Sizes(means, _mean(whole), float(np.mean(list(counts.values()))) if counts else 0.0)


def _mean(rows: Sequence[CaseRow]) -> Estimate | None:
    runs: dict[Run, list[float]] = defaultdict(list)
    for row in rows:
        if row.dice is not None:
            runs[row.run].append(row.dice)
    return mean_interval([float(np.mean(each)) for each in runs.values()])


def _table(site: str, found: Mapping[str, Sizes]) -> Table:
    sizes = sorted({size for each in found.values() for size in each.cut})
    rows = [
        [
            Cell(name),
            *(Cell(score(each.cut.get(size))) for size in sizes),
            Cell(score(each.whole), f"{each.cases:.0f} cases" if each.whole else ""),
        ]
        for name, each in found.items()
    ]
    return Table(f"Dice at {site} by training cases", ["variant", *map(str, sizes), "all"], rows)
