"""Carries out a study: the runs that are not done yet, several at a time, and the tables of those that are.

The trials of a search come first, then the grid with the settings that they chose. A run works in a folder of
its own, which is moved to its place once the run is done. So this may be ended at any moment: started again, it
continues with the missing runs and ends with the same tables.
"""

import math
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from rich.console import Console

from fedoap.simulation.after import processes_at_once
from fedoap.simulation.processes import termination_raises
from fedoap.study.config import Study
from fedoap.study.executors import Executor, Executors, Place, open_executor
from fedoap.study.folder import StudyFolder, open_folder
from fedoap.study.grid import Grid, RunFile
from fedoap.study.lists import write_lists
from fedoap.study.progress import StudyProgress
from fedoap.study.result import RunResult
from fedoap.study.search import best, check_trials, searched_by, trials, variants_in_order
from fedoap.study.table import Done, write_tables
from fedoap.study.tables import Table

POLL_SECONDS = 0.1
TABLES_EVERY_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Options:
    """How a study is carried out; nothing here changes a figure."""

    jobs: int = 0
    """Runs at a time; 0 for as many as the cores carry."""
    on_ray: bool = False
    only: tuple[str, ...] = ()
    """Variants; all where none is given."""
    until_minutes: float | None = None
    """No run is started later than this."""


@dataclass(slots=True)
class Outcome:
    """How many runs have their figures, were left for another time, and failed."""

    done: int = 0
    left: int = 0
    failed: list[str] = field(default_factory=list)


def run_study(
    study: Study, out: Path, options: Options, console: Console, executors: Executors = open_executor
) -> Outcome:
    """Write the figures of all runs, and their tables, to a folder, as far as the options allow.

    `executors` opens what runs are started with.

    Raises:
        ConfigError: settings, or the folder, are wrong; nothing was run.
        DataError: a datalist is wrong; nothing was run.
    """
    variants = tuple(variants_in_order(study, options.only))
    check_trials(study)
    with open_folder(out, study.config.name) as folder, termination_raises():
        grid = Grid(study, write_lists(study, folder.data))
        place = Place(folder.logs, folder.cache, study.base.threads)
        with executors(place, on_ray=options.on_ray) as executor:
            return _Course(grid, folder, executor, console, Limits.of(options, study, variants)).complete()


@dataclass(frozen=True, slots=True)
class Limits:
    """What one go at a study may take."""

    variants: tuple[str, ...]
    jobs: int
    until: float
    """On the monotonic clock."""

    @classmethod
    def of(cls, options: Options, study: Study, variants: tuple[str, ...]) -> Self:
        """Return the limits that options set, from now on."""
        minutes = math.inf if options.until_minutes is None else options.until_minutes
        jobs = options.jobs or processes_at_once(study.base.threads)
        return cls(variants, jobs, time.monotonic() + 60 * minutes)

    def is_late(self) -> bool:
        """Return whether no further run may start."""
        return time.monotonic() >= self.until


class _Course:
    """One go at a study."""

    def __init__(self, grid: Grid, folder: StudyFolder, executor: Executor, console: Console, limits: Limits) -> None:
        self._grid, self._folder, self._executor, self._limits = grid, folder, executor, limits
        self._variants, self._jobs = limits.variants, limits.jobs
        self._results: dict[str, RunResult | None] = {}
        self._outcome = Outcome()
        self._written = time.monotonic()
        self._console = console

    def complete(self) -> Outcome:
        """Run what is missing and return how it went; tables are written whatever happens."""
        searched = {searched_by(self._grid.study.config.search, name): None for name in self._variants}
        first = [run for variant in searched for run in self._trials(variant)]
        # settings that are yet to be chosen change no number of runs
        total = len(first) + sum(1 for variant in self._variants for _ in self._grid.runs(variant, {}))
        seconds = [found.seconds for run in self._known(first) if (found := self._result(run))]
        with StudyProgress(self._console, total, self._jobs, seconds) as progress:
            try:
                self._carry_out(first, progress)
                self._carry_out(self._main_runs(progress), progress)
            finally:
                self._write_tables()
        self._outcome.done = sum(self._result(run) is not None for run in self._known(first))
        self._outcome.left = max(0, total - self._outcome.done - len(self._outcome.failed))
        if self._outcome.done > len(first):
            self._write_page()
        return self._outcome

    def _trials(self, variant: str) -> Iterator[RunFile]:
        seed = self._grid.study.config.seeds[0]
        for number, settings in enumerate(trials(self._grid.study, variant)):
            yield self._grid.run(variant, settings, 0, seed, trial=number)

    def _choice(self, variant: str) -> tuple[int | None, Table] | None:
        """Return a variant's chosen trial (None without a search) and its settings; None while a trial is missing."""
        runs = list(self._trials(searched_by(self._grid.study.config.search, variant)))
        if not runs:
            return None, {}
        found = [self._result(run) for run in runs]
        known = [result.dice_validation() for result in found if result is not None]
        if len(known) < len(runs):
            return None
        number = best(known)
        return number, runs[number].settings

    def _chosen_runs(self, variants: Sequence[str]) -> Iterator[RunFile]:
        for variant in variants:
            choice = self._choice(variant)
            if choice is not None:
                yield from self._grid.runs(variant, choice[1])

    def _known(self, first: Sequence[RunFile]) -> Iterator[RunFile]:
        yield from first
        yield from self._chosen_runs(self._variants)

    def _main_runs(self, progress: StudyProgress) -> list[RunFile]:
        """Return the grid's runs: all variants of one fold after the other, those with fewer cases last."""
        missing = [variant for variant in self._variants if self._choice(variant) is None]
        if missing:
            progress.say(f"not run, as trials are missing: {', '.join(missing)}")
        order = {variant: place for place, variant in enumerate(self._variants)}
        runs = self._chosen_runs(self._variants)
        return sorted(runs, key=lambda run: (bool(run.cut), run.seed, run.fold, order[run.variant]))

    def _carry_out(self, runs: Sequence[RunFile], progress: StudyProgress) -> None:
        waiting = deque(run for run in runs if self._result(run) is None)
        running: dict[str, tuple[RunFile, Path]] = {}
        while running or (waiting and not self._limits.is_late()):
            while waiting and len(running) < self._jobs and not self._limits.is_late():
                run = waiting.popleft()
                work = self._folder.begin(run, str(os.getpid()))
                running[run.name] = (run, work)
                self._executor.start(run.name, work)
                progress.started(run.name)
            for name, line in self._executor.lines():
                _show(name, line, progress)
            time.sleep(POLL_SECONDS)
            for ended in self._executor.ended():
                self._end(*running.pop(ended.name), ended.fault, progress)
            if time.monotonic() > self._written + TABLES_EVERY_SECONDS:
                self._write_tables()

    def _end(self, run: RunFile, work: Path, fault: str | None, progress: StudyProgress) -> None:
        if fault is None:
            self._folder.keep(run, work)
            result = self._result(run)
            if result is not None:
                progress.done(run.name, result.seconds, result.dice_test() if run.trial is None else None)
                return
        self._outcome.failed.append(run.name)
        progress.failed(run.name, fault or "it left no figures")

    def _result(self, run: RunFile) -> RunResult | None:
        # a run that is done is read once; the digest is part of the key, as trials may change a run's settings
        key = f"{run.name} {run.digest}"
        if self._results.get(key) is None:
            self._results[key] = self._folder.result(run)
        return self._results[key]

    def _write_tables(self) -> None:
        study = self._grid.study
        every = tuple(study.config.variants)
        choices = {variant: self._choice(variant) for variant in every}
        chosen = {variant: choice[0] for variant, choice in choices.items() if choice and choice[0] is not None}
        runs = [*(run for variant in every for run in self._trials(variant)), *self._chosen_runs(every)]
        done: list[Done] = [(run, result) for run in runs if (result := self._result(run)) is not None]
        write_tables(self._folder.out, done, chosen, searched=study.config.search is not None)
        self._written = time.monotonic()

    def _write_page(self) -> None:
        from fedoap.report.study import write_study_report  # noqa: PLC0415 - charts take a second to import

        write_study_report(self._folder.out, self._folder.out / "report.html")


def _show(name: str, line: object, progress: StudyProgress) -> None:
    match line:
        case {"site": str(site), "round": int(number), "stage": str(stage), "step": int(step), "steps": int(steps)}:
            progress.at(name, step, steps, f"{site} {stage} round {number}")
        case _:
            return
