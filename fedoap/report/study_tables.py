"""Tables of scores and of paired differences, and the marks of the best rows."""

from collections.abc import Callable, Mapping, Sequence

from fedoap.report.statistics import Comparison, Estimate, correct
from fedoap.report.study_content import Cell, Mark, Table, difference, plural, score
from fedoap.report.study_scores import METRICS, Metric, Scores

MEAN = "mean over sites"
Family = dict[tuple[str, str | None], Comparison]
"""Comparisons by variant and site; None is the mean over sites."""
Marks = Mapping[tuple[str, str | None], Mark]
"""Marks by variant and site."""
Mean = Callable[[str, str | None, Metric], Estimate | None]
"""Gives a variant's mean at a site, or over all."""


def columns(scores: Scores) -> tuple[str | None, ...]:
    """Return the sites, after None for the mean over sites if there are several."""
    return (None, *scores.sites) if len(scores.sites) > 1 else scores.sites


def head(scores: Scores, first: str = "variant") -> list[str]:
    """Return the titles of the columns."""
    return [first, *(site or MEAN for site in columns(scores))]


def score_tables(scores: Scores, variants: Sequence[str], rivals: Sequence[str], metric: Metric) -> list[Table]:
    """Return one metric's means over runs and over patients; no table if no case has it.

    Among the rivals the best is marked, if it can be told.
    """
    missing, cases = scores.undefined(metric)
    if missing == cases:
        return []
    shown = [name for name in variants if name in scores.variants]
    most = max((len(scores.runs(name)) for name in shown), default=0)
    names = {name: _with_runs(scores, name, most) for name in shown}
    better = "higher is better" if metric.sign > 0 else "lower is better"

    def table(over: str, mean: Mean, marks: Marks, notes: Sequence[str] = ()) -> Table:
        def cell(name: str, site: str | None) -> Cell:
            return Cell(score(mean(name, site, metric), metric.digits), mark=marks.get((name, site), ""))

        rows = [[Cell(names[name]), *(cell(name, site) for site in columns(scores))] for name in shown]
        return Table(f"{metric.label} ({better}), mean over {over}", head(scores), rows, notes)

    return [
        table(
            "runs",
            scores.over_runs,
            best_marks(scores, rivals, metric),
            [_about_runs(most), *_about_undefined(scores, metric)],
        ),
        table("patients", scores.over_patients, {}),
    ]


def best_marks(scores: Scores, variants: Sequence[str], metric: Metric) -> Marks:
    """Return "best" for the leader of a column that is significantly better than all others, else "tied".

    Tied are the leader and those that it is not significantly better than. The mean over runs decides who leads; only
    variants with all runs take part. Each leader is compared with every other variant, and p is corrected for all
    comparisons of the table.
    """
    candidates = scores.complete(name for name in variants if name in scores.variants)
    leaders: dict[str | None, str] = {}
    family: dict[tuple[str, str | None], Comparison | None] = {}
    for site in columns(scores):
        means = {name: each for name in candidates if (each := scores.over_runs(name, site, metric))}
        if len(means) < 2:
            continue
        leaders[site] = max(means, key=lambda name: means[name].mean * metric.sign)
        family |= {
            (name, site): scores.compare(leaders[site], name, site, metric) for name in means if name != leaders[site]
        }
    tied = {key for key, each in correct(family).items() if each.verdict != "better"}
    tied |= {key for key, each in family.items() if each is None}
    marks: dict[tuple[str, str | None], Mark] = dict.fromkeys(tied, "tied")
    for site, leader in leaders.items():
        marks[leader, site] = "tied" if any(each == site for _, each in tied) else "best"
    return marks


def compare_all(scores: Scores, variants: Sequence[str], other: str, metric: Metric) -> Family:
    """Return each variant's difference to another at each site and over all, p corrected for all of them."""
    return correct(
        {
            (name, site): scores.compare(name, other, site, metric)
            for name in variants
            if name != other and name in scores.variants
            for site in columns(scores)
        }
    )


def difference_table(scores: Scores, variants: Sequence[str], other: str, metric: Metric) -> Table:
    """Return the differences of each variant to another."""
    family = compare_all(scores, variants, other, metric)
    shown = [name for name in variants if name != other and name in scores.variants]
    rows = [
        [Cell(name), *(difference(family.get((name, site)), metric.digits) for site in columns(scores))]
        for name in shown
    ]
    better = "above zero is better" if metric.sign > 0 else "below zero is better"
    tested = sum(each.p is not None for each in family.values())
    return Table(
        f"{metric.label}: difference to {other} ({better})",
        head(scores),
        rows,
        [f"p is corrected for {plural(tested, 'comparison')}."],
    )


def difference_tables(scores: Scores, variants: Sequence[str], other: str) -> list[Table]:
    """Return the table of each metric that some case has, Dice first."""
    known = [metric for metric in METRICS if scores.undefined(metric)[0] < scores.undefined(metric)[1]]
    return [difference_table(scores, variants, other, metric) for metric in known]


def _with_runs(scores: Scores, name: str, most: int) -> str:
    count = len(scores.runs(name))
    return name if count == most else f"{name} ({count} of {most} runs)"


def _about_runs(most: int) -> str:
    if most < 2:
        return "One run: no interval over runs."
    return f"± is the half width of the 95 % t-interval over {most} runs."


def _about_undefined(scores: Scores, metric: Metric) -> list[str]:
    missing, cases = scores.undefined(metric)
    if not missing:
        return []
    return [
        f"Not defined in {missing} of {cases} cases, which are left out: where a mask is empty there is no distance. "
        "A variant that finds nothing in a case loses nothing here, but does in Dice."
        if metric.column == "hd95_mm"
        else f"Not defined in {missing} of {cases} cases, which are left out."
    ]
