"""What a study was: its data, missing runs, course, cost, search for settings, and how the figures are made."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from fedoap.report.statistics import mean_interval
from fedoap.report.study_charts import Look, Point, lines, scatter
from fedoap.report.study_content import NOTHING, Cell, Drawing, Section, Table, plural, row, score
from fedoap.report.study_rows import CaseRow, RoundRow, TuningRow
from fedoap.report.study_scores import DICE, Scores, Study
from fedoap.report.study_tables import MEAN

MEGABYTE = 1e6
METHODS = (
    "Mean over runs: each run's mean over the cases of its test list, then Student's t-interval over runs. The runs of "
    "a cross-validation share training cases, so this interval is too narrow: no unbiased estimate of that variance "
    "exists (Bengio & Grandvalet 2004, JMLR 5:1089).",
    "Mean over patients: each patient's mean over cases and runs, then Student's t-interval over patients. Images of "
    "one patient are not independent, so the patient is the unit (Altman & Bland 1997, BMJ 314:1874). The mean over "
    "sites gives each site the same weight; its degrees of freedom are Satterthwaite's (1946).",
    "Comparisons are paired by patient: Wilcoxon's signed-rank test (1945), zeros after Pratt (1959), p corrected "
    "after Holm (1979) over all cells of a table. Over sites, each site's ranks are summed by themselves and weigh the "
    "same (after van Elteren 1960). A difference counts only if p < 0.05 and mean and ranks agree on its side.",
    "Who leads a table, and which baseline is the best, is chosen on the same test cases: that favours whoever it is.",
)


def facts(study: Study) -> list[str]:
    """Return what was run, in sentences."""
    tables, runs = study.tables, study.runs
    folds, seeds = sorted({run.fold for run in runs}), sorted({run.seed for run in runs})
    split = (
        f"Cross-validation by patient, {len(folds)} folds ({_listed(folds)}): no patient is tested in two of them."
        if study.is_cross_validation
        else "One split: every run is tested on the same cases."
    )
    steps = sorted({each.steps for each in tables.runs if each.steps is not None})
    budget = f"Gradient steps at each site: {_listed(steps)}." if steps else "The budget of steps is not known."
    if len(steps) > 1:
        budget += " They differ between variants, so not all had the same budget."
    versions = sorted({f"fedoap {each.fedoap}, torch {each.torch}" for each in tables.runs})
    return [
        f"{plural(len(study.roles.everyone), 'variant')}, {plural(len(study.final.sites), 'site')}. {split} "
        f"Seeds: {_listed(seeds)}.",
        budget,
        *([f"Made with {'; '.join(versions)}."] if versions else ["The versions are not known: runs.csv is missing."]),
    ]


def completeness(study: Study) -> list[str]:
    """Return how much of the grid is done, and what is missing, by variant."""
    runs, variants = study.runs, study.roles.everyone
    done = {name: study.done(name) for name in variants}
    total = len(runs) * len(variants)
    count = sum(map(len, done.values()))
    said = [f"{count} of {plural(total, 'run')} done, of the variants, folds and seeds that have begun."]
    for name, found in done.items():
        if missing := [run for run in runs if run not in found]:
            where = ", ".join(f"fold {run.fold} seed {run.seed}" for run in missing)
            said.append(
                f"Missing of {name}: {where}. Its means are of fewer cases; its differences are of those shared."
            )
    for name, rows in (("rounds.csv", study.tables.rounds), ("runs.csv", study.tables.runs)):
        if not rows:
            said.append(f"{name} is missing or empty, so what it holds is not shown.")
    return said


def data_section(study: Study) -> Section:
    """Return what each site trained and was tested on."""
    rows = []
    for split, note in (("test", ""), ("unseen", " (unseen)")):
        found: dict[str, list[CaseRow]] = defaultdict(list)
        for each in study.whole:
            if each.split == split and each.variant not in study.roles.pooled:
                found[each.site].append(each)
        for site, cases in sorted(found.items()):
            rows.append(
                row(
                    f"{site}{note}",
                    ", ".join(sorted({each.organ for each in cases})),
                    _span(each.training_cases for each in cases if each.training_cases is not None),
                    str(len({each.case for each in cases})),
                    str(len({each.patient for each in cases})),
                )
            )
    head = ["site", "organ", "training cases", "test cases, all runs together", "patients"]
    return Section("Data", completeness(study), [Table("Cases of each site", head, rows)])


def course_section(study: Study, look: dict[str, Look]) -> Section | None:
    """Return validation Dice against gradient steps, and what it cost."""
    sent = _bytes(study.tables.rounds)
    table = _cost(study, sent)
    drawings = [*_course(study, look), *_bytes_against_dice(study, sent, look)]
    return Section("Course and cost", (), [table] if table else [], drawings=drawings) if drawings or table else None


def tuning_section(study: Study) -> Section | None:
    """Return what was searched for each variant, with which budget, and what was chosen."""
    rows = study.tables.tuning
    if not rows:
        return None
    trials: dict[str, dict[int, list[TuningRow]]] = defaultdict(lambda: defaultdict(list))
    for each in rows:
        trials[each.variant][each.trial].append(each)
    counts = {len(found) for found in trials.values()}
    runs = {(each.fold, each.seed) for each in rows}
    budget = (
        f"Each of {plural(len(trials), 'variant')} had {plural(counts.pop(), 'trial')}"
        if len(counts) == 1
        else f"Variants had {min(counts)} to {max(counts)} trials, so not all had the same budget"
    )
    where = ", ".join(f"fold {fold} seed {seed}" for fold, seed in sorted(runs))
    unused = (
        "The test cases of this fold played no part; those of other folds trained and validated in these trials."
        if study.is_cross_validation
        else "Test cases played no part."
    )
    text = [f"{budget}, judged on validation cases alone: mean Dice over sites ({where}). {unused}"]
    chosen = [_chosen(name, found) for name, found in sorted(trials.items())]
    every = [
        row(name, str(trial), each[0].settings, _validation_mean(each), "yes" if each[0].chosen else "")
        for name, found in sorted(trials.items())
        for trial, each in sorted(found.items())
    ]
    return Section(
        "Settings that were searched",
        text,
        [Table("Chosen", ["variant", "trials", "settings", "validation Dice", "range of all trials"], chosen)],
        [Table("Every trial", ["variant", "trial", "settings", "validation Dice", "chosen"], every)],
        "Every trial",
    )


def stages_section(study: Study) -> Section | None:
    """Return the scores before calibration and of the shared path next to the final ones."""
    titles = {"before calibration": "before", "final": "final", "shared path": "shared"}
    stages: dict[str, Scores] = {title: study.stage(stage) for title, stage in titles.items()}
    known = {title: scores for title, scores in stages.items() if scores.variants}
    if len(known) < 2:
        return None
    rows = [
        [Cell(name), *(Cell(score(scores.over_runs(name, None, DICE))) for scores in known.values())]
        for name in study.roles.everyone
        if any(name in scores.variants for title, scores in known.items() if title != "final")
    ]
    return Section("Stages", (), [Table(f"Dice, {MEAN}, mean over runs", ["variant", *known], rows)])


def methods_section() -> Section:
    """Return how the figures are made."""
    return Section("How the figures are made", METHODS)


def _chosen(name: str, trials: dict[int, list[TuningRow]]) -> list[Cell]:
    best = [each for each in trials.values() if each[0].chosen]
    means = [value for each in trials.values() if (value := _mean_over_sites(each)) is not None]
    span = f"{min(means):.3f} to {max(means):.3f}" if means else NOTHING
    if not best:
        return row(name, str(len(trials)), "none chosen yet", NOTHING, span)
    return row(name, str(len(trials)), best[0][0].settings, _validation_mean(best[0]), span)


def _validation_mean(rows: Sequence[TuningRow]) -> str:
    value = _mean_over_sites(rows)
    return NOTHING if value is None else f"{value:.3f}"


def _mean_over_sites(rows: Sequence[TuningRow]) -> float | None:
    sites: dict[str, list[float]] = defaultdict(list)
    for each in rows:
        if each.dice_validation is not None:
            sites[each.site].append(each.dice_validation)
    return float(np.mean([np.mean(values) for values in sites.values()])) if sites else None


def _course(study: Study, look: dict[str, Look]) -> list[Drawing]:
    series = {name: points for name in study.drawn if (points := _validation(study, name))}
    if not series:
        return []
    return [Drawing("course", f"Validation Dice, {MEAN} and runs", lines(series, "gradient steps", "Dice", look))]


def _bytes_against_dice(study: Study, sent: dict[str, dict[object, int]], look: dict[str, Look]) -> list[Drawing]:
    points: dict[str, Point] = {
        name: (float(np.mean(list(sent[name].values()))) / MEGABYTE, each)
        for name in study.roles.compared
        if name in sent and (each := study.final.over_runs(name, None, DICE))
    }
    if not points:
        return []
    return [Drawing("bytes", "Bytes moved in a run against test Dice", scatter(points, "MB in a run", "Dice", look))]


def _validation(study: Study, variant: str) -> list[Point]:
    """Return the mean over sites at each step that all sites have, with the interval over runs."""
    steps: dict[int, dict[object, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for each in study.tables.rounds:
        if each.variant == variant and each.dice_validation is not None and each.step is not None:
            steps[each.step][each.run][each.site] = each.dice_validation
    most = max((len(sites) for runs in steps.values() for sites in runs.values()), default=0)
    points = []
    for step, runs in sorted(steps.items()):
        means = [float(np.mean(list(sites.values()))) for sites in runs.values() if len(sites) == most]
        if estimate := mean_interval(means):
            points.append((float(step), estimate))
    return points


def _bytes(rows: Iterable[RoundRow]) -> dict[str, dict[object, int]]:
    totals: dict[str, dict[object, int]] = defaultdict(lambda: defaultdict(int))
    for each in rows:
        totals[each.variant][each.run] += (each.bytes_sent or 0) + (each.bytes_received or 0)
    return totals


def _cost(study: Study, sent: dict[str, dict[object, int]]) -> Table | None:
    if not study.tables.runs and not sent:
        return None
    rows = []
    for name in study.roles.everyone:
        runs = [each for each in study.tables.runs if each.variant == name]
        seconds = mean_interval([each.seconds for each in runs if each.seconds is not None])
        moved = mean_interval([count / MEGABYTE for count in sent[name].values()]) if name in sent else None
        rows.append(
            row(
                name,
                _span(each.steps for each in runs if each.steps is not None),
                _span(each.parameters for each in runs if each.parameters is not None),
                NOTHING if moved is None else f"{moved.mean:.1f}",
                score(seconds, 0),
            )
        )
    head = ["variant", "steps at a site", "parameters", "MB moved in a run, all sites", "seconds of a run"]
    return Table("Cost", head, rows, ["Bytes are what all sites sent and received."])


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    if not found:
        return NOTHING
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
