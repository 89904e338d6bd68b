"""The roles of a study's variants, and their scores by run and by patient."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedoap.report.statistics import Comparison, Estimate, compare, mean_interval, stratified_interval
from fedoap.report.study_rows import CaseRow, Run, Tables

MAIN = "fedoap"
LOCAL = "local"
POOLED = "pooled"
MOST_DRAWN = 8


@dataclass(frozen=True, slots=True)
class Metric:
    """One measure of how well a mask fits."""

    column: str
    label: str
    sign: int
    """1 where more is better, -1 where less is."""
    digits: int


DICE = Metric("dice", "Dice", 1, 3)
HD95 = Metric("hd95_mm", "HD95 (mm, or pixels)", -1, 2)
"""In pixels if the images have no spacing."""
METRICS = (DICE, Metric("iou", "IoU", 1, 3), HD95, Metric("nsd", "NSD", 1, 3))


@dataclass(frozen=True, slots=True)
class Roles:
    """The variants by their roles, which their names decide."""

    main: str | None
    local: str | None
    pooled: tuple[str, ...]
    baselines: tuple[str, ...]
    """Federated, and neither the main one nor one of its ablations."""
    ablations: tuple[str, ...]
    others: tuple[str, ...]
    """Training alone in another way."""

    @property
    def compared(self) -> tuple[str, ...]:
        """The rows of a table of scores, without the ablations."""
        ends = (self.local, *self.others, *self.baselines, self.main, *self.pooled)
        return tuple(name for name in ends if name is not None)

    @property
    def rivals(self) -> tuple[str, ...]:
        """Those that can win: all but the bound."""
        return tuple(name for name in self.compared if name not in self.pooled)

    @property
    def everyone(self) -> tuple[str, ...]:
        """Every variant, the ablations after the main one."""
        names = self.compared
        place = len(names) - len(self.pooled)
        return names[:place] + self.ablations + names[place:]


def assign_roles(variants: Iterable[str]) -> Roles:
    """Return the roles of the variants, by name.

    >>> assign_roles(["fedavg", "fedoap", "fedoap-no-bank", "local", "pooled"]).baselines
    ('fedavg',)
    """
    names = sorted(set(variants))
    pooled = tuple(name for name in names if _is_kind(name, POOLED))
    ablations = tuple(name for name in names if name.startswith(MAIN) and name != MAIN)
    others = tuple(name for name in names if name.startswith(f"{LOCAL}-"))
    taken = {*pooled, *ablations, *others, MAIN, LOCAL}
    return Roles(
        main=MAIN if MAIN in names else None,
        local=LOCAL if LOCAL in names else None,
        pooled=pooled,
        baselines=tuple(name for name in names if name not in taken),
        ablations=ablations,
        others=others,
    )


Place = tuple[Run, int]
"""A run and a case of its test list."""


class Scores:
    """The cases of one split and stage, and their means and differences."""

    def __init__(self, cases: Iterable[CaseRow]) -> None:
        found: dict[tuple[str, str], dict[Place, CaseRow]] = defaultdict(dict)
        for row in cases:
            found[row.variant, row.site][row.run, row.case] = row
        self._rows: Mapping[tuple[str, str], Mapping[Place, CaseRow]] = found
        self.sites: tuple[str, ...] = tuple(sorted({site for _, site in found}))
        self.variants: frozenset[str] = frozenset(variant for variant, _ in found)

    def rows(self, variant: str, site: str) -> Mapping[Place, CaseRow]:
        """Return the cases of a variant at a site, by run and case."""
        return self._rows.get((variant, site), {})

    def runs(self, variant: str, site: str | None = None) -> frozenset[Run]:
        """Return the runs that a variant has at a site, or at all sites."""
        sites = [site] if site else self.sites
        runs = [frozenset(run for run, _ in self.rows(variant, name)) for name in sites]
        return frozenset.intersection(*runs) if runs else frozenset()

    def by_run(self, variant: str, site: str, metric: Metric) -> dict[Run, float]:
        """Return the mean over the cases of each run."""
        values: dict[Run, list[float]] = defaultdict(list)
        for (run, _), row in self.rows(variant, site).items():
            if (value := _measure(row, metric)) is not None:
                values[run].append(value)
        return {run: float(np.mean(each)) for run, each in values.items()}

    def over_runs(self, variant: str, site: str | None, metric: Metric) -> Estimate | None:
        """Return the mean over runs at a site, or of the mean over sites in each run that has all of them."""
        by_site = [self.by_run(variant, name, metric) for name in ([site] if site else self.sites)]
        runs = [run for run in sorted(by_site[0]) if all(run in each for each in by_site)] if by_site else []
        return mean_interval([float(np.mean([each[run] for each in by_site])) for run in runs])

    def over_patients(self, variant: str, site: str | None, metric: Metric) -> Estimate | None:
        """Return the mean over patients at a site, or the mean of the sites' means."""
        sites = [site] if site else self.sites
        return stratified_interval([self._patients(variant, name, metric) for name in sites])

    def differences(self, variant: str, other: str, site: str, metric: Metric) -> dict[int, float]:
        """Return each patient's mean difference over the cases and runs where both variants have a value."""
        ours, theirs = self.rows(variant, site), self.rows(other, site)
        gathered: dict[int, list[float]] = defaultdict(list)
        for place, row in ours.items():
            pair = _measure(row, metric), _measure(theirs[place], metric) if place in theirs else None
            if pair[0] is not None and pair[1] is not None:
                gathered[row.patient].append(pair[0] - pair[1])
        return {patient: float(np.mean(each)) for patient, each in sorted(gathered.items())}

    def compare(self, variant: str, other: str, site: str | None, metric: Metric) -> Comparison | None:
        """Return how far a variant is from another, over patients, at a site or over all sites."""
        sites = [site] if site else self.sites
        groups = [list(self.differences(variant, other, name, metric).values()) for name in sites]
        return compare(groups, metric.sign)

    def complete(self, variants: Iterable[str]) -> tuple[str, ...]:
        """Return the variants with most runs at all sites: the figures of the others are of fewer cases."""
        counts = {name: len(self.runs(name)) for name in variants}
        most = max(counts.values(), default=0)
        return tuple(name for name, count in counts.items() if count == most and most)

    def best(self, variants: Iterable[str], metric: Metric = DICE) -> str | None:
        """Return the variant with the best mean over sites and runs, None if there is none."""
        means = {name: self.over_runs(name, None, metric) for name in self.complete(variants)}
        ranked = [(each.mean * metric.sign, name) for name, each in means.items() if each]
        return max(ranked)[1] if ranked else None

    def undefined(self, metric: Metric) -> tuple[int, int]:
        """Return the number of undefined values and of cases."""
        rows = [row for each in self._rows.values() for row in each.values()]
        return sum(_measure(row, metric) is None for row in rows), len(rows)

    def _patients(self, variant: str, site: str, metric: Metric) -> list[float]:
        values: dict[int, list[float]] = defaultdict(list)
        for row in self.rows(variant, site).values():
            if (value := _measure(row, metric)) is not None:
                values[row.patient].append(value)
        return [float(np.mean(values[patient])) for patient in sorted(values)]


class Study:
    """A study's tables, and what several parts of the page derive from them."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.most = _most_training_cases(tables.cases)
        self.cut = _cut_variants(tables.cases, self.most)
        """Variants that were trained on fewer cases at some site: points of a curve, not rows of the tables."""
        self.roles = assign_roles({row.variant for row in tables.cases} - self.cut)

    @cached_property
    def final(self) -> Scores:
        """The test cases of the finished models, each variant trained on all that its sites have."""
        return self.stage("final")

    def stage(self, stage: str, split: str = "test") -> Scores:
        """Return the cases of a split at a stage, without those of a model trained on fewer cases."""
        return Scores(row for row in self.whole if row.stage == stage and row.split == split)

    @cached_property
    def best_baseline(self) -> str | None:
        """The federated baseline with the best mean test Dice; chosen on the test cases, so in its favour."""
        return self.final.best(self.roles.baselines)

    @cached_property
    def best_pooled(self) -> str | None:
        """The best of the variants that train on all sites' cases together."""
        return self.final.best(self.roles.pooled)

    @property
    def drawn(self) -> tuple[str, ...]:
        """The variants that figures show: all that are compared, or of many those that the others are held against."""
        roles = self.roles
        if len(roles.compared) <= MOST_DRAWN:
            return roles.compared
        kept = (roles.local, self.best_baseline, roles.main, self.best_pooled)
        return tuple(name for name in roles.compared if name in kept)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Every fold and seed that some variant has."""
        return tuple(sorted({row.run for row in self.whole if row.split == "test"}))

    @property
    def is_cross_validation(self) -> bool:
        """Whether the runs differ in what they are tested on."""
        return len({run.fold for run in self.runs}) > 1

    def done(self, variant: str) -> frozenset[Run]:
        """Return the runs of a variant of which there are cases."""
        return frozenset(row.run for row in self.whole if row.variant == variant and row.split == "test")

    @cached_property
    def whole(self) -> list[CaseRow]:
        """The rows of models that were trained on all cases of all sites."""
        return [row for row in self.tables.cases if row.variant not in self.cut and not is_cut(row, self.most)]


def family(variant: str, known: Iterable[str]) -> str:
    """Return which variant one trained on fewer cases is a smaller twin of: the longest name that begins its own.

    >>> family("fedavg-kidney-6", ["fedavg", "fedoap"]), family("local-12", [])
    ('fedavg', 'local')
    """
    parents = [name for name in known if _is_kind(variant, name)]
    return max(parents, key=len) if parents else variant.rstrip("0123456789").rstrip("-_")


def _most_training_cases(cases: Iterable[CaseRow]) -> dict[tuple[str, Run], int]:
    """Return how many training cases a site had at most, in each run; pooling has all sites' and does not count."""
    most: dict[tuple[str, Run], int] = defaultdict(int)
    for row in cases:
        if row.training_cases is not None and row.split == "test" and not _is_kind(row.variant, POOLED):
            most[row.site, row.run] = max(most[row.site, row.run], row.training_cases)
    return dict(most)


def _cut_variants(cases: Iterable[CaseRow], most: Mapping[tuple[str, Run], int]) -> frozenset[str]:
    """Return the variants that at some site have none but models trained on fewer cases."""
    whole: dict[tuple[str, str], bool] = defaultdict(bool)
    for row in cases:
        if row.split == "test":
            whole[row.variant, row.site] |= not is_cut(row, most)
    return frozenset(variant for (variant, _), is_whole in whole.items() if not is_whole)


def is_cut(row: CaseRow, most: Mapping[tuple[str, Run], int]) -> bool:
    """Return whether a site had fewer training cases in this row than in others of the same fold and seed."""
    return row.training_cases is not None and row.training_cases < most.get((row.site, row.run), 0)


def _measure(row: CaseRow, metric: Metric) -> float | None:
    value: float | None = getattr(row, metric.column)
    return value


def _is_kind(name: str, kind: str) -> bool:
    return name == kind or name.startswith(f"{kind}-")
