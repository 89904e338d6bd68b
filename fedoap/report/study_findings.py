"""What a study's figures say in sentences, and the parts of the page that compare: bound, ablations, unseen organs."""

from collections.abc import Sequence

from fedoap.report.statistics import FEWEST_PAIRS, Estimate, share
from fedoap.report.study_charts import forest
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
from fedoap.report.study_scores import DICE, METRICS, Metric, Scores, Study
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
    }
    known = {title: scores for title, scores in stages.items() if scores.sites}
    if not known:
        return None
    tables, more = [], []
    for title, scores in known.items():
        shown = [name for name in study.roles.everyone if name in scores.variants]
        best = scores.best(name for name in study.roles.baselines if name in scores.variants)
        tables += [_unseen_table(scores, shown, site, f"{site}, {title}") for site in scores.sites]
        if best:
            more.append(_renamed(difference_table(scores, study.roles.rivals, best, DICE), title))
    text = [
        "These sites took no part in training. Zero-shot is the shared model as it is; “after 2 epochs” it was trained "
        "for two epochs on the site's own training cases. local starts these epochs from the initial weights.",
    ]
    return Section("Unseen sites", text, tables, more, "Differences to the best federated baseline")


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
