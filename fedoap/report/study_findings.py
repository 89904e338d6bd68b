"""What a study's figures say in sentences, and the parts of the page that compare: bound, ablations, unseen organs."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from fedoap.report.statistics import FEWEST_PAIRS, Estimate, mean_interval, share
from fedoap.report.study_charts import Look, Point, forest, lines
from fedoap.report.study_content import (
    NOTHING,
    Cell,
    Drawing,
    Section,
    Table,
    difference,
    plural,
    score,
    sentence,
)
from fedoap.report.study_scores import DICE, METRICS, Metric, Scores, Study, family, is_cut
from fedoap.report.study_tables import (
    MEAN,
    columns,
    compare_all,
    difference_table,
    difference_tables,
    head,
)


def headline(study: Study) -> list[str]:
    """Return the main variant's differences in words: over all sites, and at the site where they are lowest."""
    roles, scores, main = study.roles, study.final, study.roles.main
    if main is None:
        return []
    said = []
    for other in (roles.local, study.best_baseline):
        if other is None:
            continue
        found = compare_all(scores, roles.rivals, other, DICE)
        sites = [site for site in columns(scores) if (main, site) in found]
        lowest = min(filter(None, sites), key=lambda site: found[main, site].effect.mean, default=None)
        for site in dict.fromkeys([sites[0], lowest] if sites else []):
            where = site or MEAN
            name = f"{where}, where it is lowest" if site and len(sites) > 1 else where
            said.append(sentence(f"Dice of {main} minus {other}, {name}", found[main, site]))
    return said


def differences_section(study: Study) -> Section:
    """Return the differences to training alone and to the best federated baseline."""
    roles, scores, best = study.roles, study.final, study.best_baseline
    shown = roles.rivals
    text = [
        "Each patient is a pair: the mean difference over the patient's cases and runs where both variants have a "
        f"value. ± is the half width of the 95 % t-interval over patients; for “{MEAN}” each site weighs the same, "
        "in mean and test. p is of the Wilcoxon signed-rank test, two-sided, corrected after Holm for all comparisons "
        "of a table; "
        f"“better” and “worse” need p < 0.05. Below {FEWEST_PAIRS} pairs the test cannot reach that.",
    ]
    groups = []
    if roles.local:
        groups.append(difference_tables(scores, shown, roles.local))
    else:
        text.append("No variant is named local, so nothing is compared with training alone.")
    if best:
        text.append(f"The best federated baseline is {best}: it has the highest mean test Dice, which favours it.")
        groups.append(difference_tables(scores, shown, best))
    else:
        text.append("There is no federated baseline.")
    drawings = [] if roles.local is None else _forest(study, shown, roles.local, "differences")
    return Section(
        "Paired differences",
        text,
        [tables[0] for tables in groups],
        [table for tables in groups for table in tables[1:]],
        "The same for IoU, HD95 and NSD",
        drawings,
    )


def bound_section(study: Study) -> Section | None:
    """Return what pooling all cases gains over training alone, and which share of it each variant reaches."""
    roles, scores, pooled = study.roles, study.final, study.best_pooled
    if pooled is None or roles.local is None or roles.local not in scores.variants:
        return None
    gains = compare_all(scores, [pooled], roles.local, DICE)
    text = [f"The bound is {pooled}: one network on all sites' cases. Its gain over training alone is in Dice."]
    reached = []
    for site in columns(scores):
        gain = gains.get((pooled, site))
        if gain is None:
            continue
        if gain.verdict == "better":
            reached.append(site)
        else:
            text.append(_without_gain(site or MEAN, sentence("", gain).removeprefix(": ")))
    shown = [name for name in (*roles.baselines, roles.main, *roles.ablations) if name and name in scores.variants]
    rows = [
        [Cell(f"{pooled} - {roles.local}"), *(difference(gains.get((pooled, site))) for site in columns(scores))],
        *([Cell(name), *(_share(study, name, pooled, site, reached) for site in columns(scores))] for name in shown),
    ]
    notes = [
        "Rows of variants: share of pooling's gain, with the percentile bootstrap's 95 % interval over patients; "
        "given only where pooling is significantly better than training alone. "
        f"p is corrected for {plural(len(gains), 'comparison')}.",
    ]
    return Section(
        "Pooling as the upper bound", text, [Table("Share of pooling's gain in Dice", head(scores), rows, notes)]
    )


def ablation_section(study: Study) -> Section | None:
    """Return each ablation's difference to the main variant."""
    roles, scores = study.roles, study.final
    if roles.main is None or roles.main not in scores.variants or not roles.ablations:
        return None
    tables = difference_tables(scores, roles.ablations, roles.main)
    text = [
        f"Each row differs from {roles.main} in what its name says; below zero, {roles.main} is the better by Dice."
    ]
    drawings = _forest(study, roles.ablations, roles.main, "ablations")
    return Section("Ablations", text, tables[:1], tables[1:], "The same for IoU, HD95 and NSD", drawings)


def unseen_section(study: Study) -> Section | None:
    """Return the figures at sites that took no part."""
    stages = {
        "zero-shot": study.stage("zero_shot", "unseen"),
        "after 2 epochs": study.stage("tuned", "unseen"),
        "finished": study.stage("final", "unseen"),
    }
    known = {title: scores for title, scores in stages.items() if scores.sites}
    if not known:
        return None
    tables, more = [], []
    for title, scores in known.items():
        shown = [name for name in study.roles.everyone if name in scores.variants]
        best = scores.best(name for name in study.roles.baselines if name in scores.variants)
        for site in scores.sites:
            table = _unseen_table(scores, shown, site, f"{site}, {title}")
            tables.append(table)
        if best:
            more.append(_renamed(difference_table(scores, study.roles.rivals, best, DICE), title))
    text = [
        "These sites took no part in training. Zero-shot is the shared model as it is; “after 2 epochs” it was trained "
        "for two epochs on the site's own training cases.",
    ]
    return Section("Unseen sites", text, tables, more, "Differences to the best federated baseline")


def sizes_section(study: Study, look: dict[str, Look]) -> Section | None:
    """Return Dice against how many training cases a site had, where a study varies that."""
    points = _by_size(study)
    if not points:
        return None
    drawings, tables = [], []
    for site, series in points.items():
        known = {name: each for name, each in series.items() if name in study.drawn}
        drawings.append(Drawing(f"sizes-{site}", f"Test Dice at {site}", lines(known, "training cases", "Dice", look)))
        rows = [
            [Cell(name), *(Cell(f"{size:.0f}: {score(each)}") for size, each in values)]
            for name, values in series.items()
        ]
        widest = max(len(each) for each in rows)
        filled = [[*each, *[Cell(NOTHING)] * (widest - len(each))] for each in rows]
        tables.append(Table(f"{site}: training cases and Dice", ["variant", *[""] * (widest - 1)], filled))
    text = ["Only the site named had fewer cases. ± is the 95 % t-interval over runs."]
    return Section("Dice against training-set size", text, tables, drawings=drawings)


def _by_size(study: Study) -> dict[str, dict[str, list[Point]]]:
    cut_sites = sorted({row.site for row in study.tables.cases if is_cut(row, study.most)})
    names = study.roles.everyone
    found: dict[str, dict[str, list[Point]]] = {}
    for site in cut_sites:
        runs: dict[tuple[str, int | None], dict[object, list[float]]] = defaultdict(lambda: defaultdict(list))
        sizes: dict[str, list[int]] = defaultdict(list)
        for row in study.tables.cases:
            if row.site != site or row.stage != "final" or row.dice is None or row.training_cases is None:
                continue
            name = family(row.variant, names)
            cut = is_cut(row, study.most)
            if row.variant in study.cut and not cut:
                continue
            runs[name, row.training_cases if cut else None][row.run].append(row.dice)
            if not cut:
                sizes[name].append(row.training_cases)
        found[site] = _points(runs, sizes)
    return found


def _points(
    runs: dict[tuple[str, int | None], dict[object, list[float]]], sizes: dict[str, list[int]]
) -> dict[str, list[Point]]:
    series: dict[str, list[Point]] = defaultdict(list)
    for (name, size), values in runs.items():
        estimate = mean_interval([float(np.mean(each)) for each in values.values()])
        if estimate:
            series[name].append((float(np.mean(sizes[name])) if size is None else float(size), estimate))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in series.items() if len(points) > 1}


def _without_gain(place: str, figures: str) -> str:
    return (
        f"At {place} pooling all cases gains nothing over training alone that these cases show, {figures} "
        "No federation can be expected to."
    )


def _share(study: Study, name: str, pooled: str, site: str | None, reached: Sequence[str | None]) -> Cell:
    local = study.roles.local
    assert local
    if site not in reached:
        return Cell(NOTHING)
    scores = study.final
    groups = []
    for place in [site] if site else scores.sites:
        part = scores.differences(name, local, place, DICE)
        whole = scores.differences(pooled, local, place, DICE)
        both = sorted(part.keys() & whole.keys())
        groups.append(([part[patient] for patient in both], [whole[patient] for patient in both]))
    estimate = share(groups)
    return Cell(NOTHING) if estimate is None else Cell(_percent(estimate.mean), _percents(estimate))


def _percents(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "no interval"
    return f"{_percent(estimate.low)} to {_percent(estimate.high)}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %".replace("-", "\N{MINUS SIGN}")


def _unseen_table(scores: Scores, variants: Sequence[str], site: str, title: str) -> Table:
    def cell(name: str, metric: Metric) -> Cell:
        return Cell(score(scores.over_runs(name, site, metric), metric.digits))

    rows = [
        [
            Cell(name),
            *(cell(name, metric) for metric in METRICS),
            Cell(score(scores.over_patients(name, site, DICE))),
            Cell(str(len(scores.runs(name, site)))),
        ]
        for name in variants
    ]
    labels = [metric.label for metric in METRICS]
    return Table(title, ["variant", *labels, "Dice, over patients", "runs"], rows)


def _renamed(table: Table, title: str) -> Table:
    return Table(f"{title}, {table.title}", table.head, table.rows, table.notes)


def _forest(study: Study, variants: Sequence[str], other: str, name: str) -> list[Drawing]:
    site = columns(study.final)[0]
    found = compare_all(study.final, variants, other, DICE)
    rows = {variant: each.effect for variant in variants if (each := found.get((variant, site)))}
    if not rows:
        return []
    title = f"Dice minus {other}'s, {site or MEAN}, with 95 % intervals over patients"
    return [Drawing(name, title, forest(rows, f"Dice minus {other}'s"))]
