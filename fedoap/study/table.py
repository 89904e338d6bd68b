"""The tidy tables of a study: one row per observation, sorted; the same figures give the same bytes."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from fedoap.study.grid import RunFile
from fedoap.study.result import RunResult

Cell: TypeAlias = str | int | float | bool | None
Row: TypeAlias = tuple[Cell, ...]
Done: TypeAlias = tuple[RunFile, RunResult]

RUN = ("study", "variant", "fold", "seed")
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "cases.csv": (
        *(*RUN, "site", "organ", "split", "stage", "case", "patient", "training_cases"),
        *("dice", "iou", "hd95_mm", "nsd"),
    ),
    "rounds.csv": (
        *(*RUN, "site", "stage", "round", "step"),
        *("loss", "dice_validation", "bytes_sent", "bytes_received", "seconds"),
    ),
    "runs.csv": (*RUN, "steps", "seconds", "parameters", "torch", "fedoap"),
    "tuning.csv": ("study", "variant", "trial", "settings", "fold", "seed", "site", "dice_validation", "chosen"),
}
SEARCHED = "tuning.csv"


def write_tables(folder: Path, done: Sequence[Done], chosen: Mapping[str, int], *, searched: bool) -> None:
    """Write the tables of all runs that are done to a folder, replacing each at once.

    Args:
        folder: The study's.
        done: Runs and their figures.
        chosen: For each variant, the trial whose settings it uses.
        searched: Whether there is a search, and hence a table of it.
    """
    grid = [(run, result) for run, result in done if run.trial is None and not run.cut]
    sizes = [(run, result) for run, result in done if run.cut]
    rows: dict[str, list[Row]] = {
        "cases.csv": [*_cases(grid), *_cut_cases(sizes)],
        "rounds.csv": list(_rounds(grid)),
        "runs.csv": [(*_run(run), *_about(result)) for run, result in grid],
    }
    if searched:
        rows[SEARCHED] = list(_trials(done, chosen))
    for name, each in rows.items():
        _write(folder / name, [COLUMNS[name], *sorted(each, key=_order)])


def _cases(done: Iterable[Done]) -> Iterable[Row]:
    for run, result in done:
        for row in result.cases:
            figures = (row.dice, row.iou, row.hd95_mm, row.nsd)
            known = (row.site, run.organs[row.site], row.split, row.stage, row.case, row.patient)
            yield (*_run(run), *known, result.training_cases[row.site], *figures)


def _cut_cases(done: Iterable[Done]) -> Iterable[Row]:
    """Yield only the rows of the site that was cut: its peers have rows of their own in the grid."""
    for run, result in done:
        kept = tuple(row for row in result.cases if row.site in run.cut)
        yield from _cases([(run, result.model_copy(update={"cases": kept}))])


def _rounds(done: Iterable[Done]) -> Iterable[Row]:
    for run, result in done:
        for row in result.rounds:
            figures = (row.loss, row.dice_validation, row.bytes_sent, row.bytes_received, round(row.seconds, 3))
            yield (*_run(run), row.site, row.stage, row.round, row.step, *figures)


def _trials(done: Iterable[Done], chosen: Mapping[str, int]) -> Iterable[Row]:
    for run, result in done:
        if run.trial is None:
            continue
        settings = json.dumps(run.settings, sort_keys=True)
        for site, dice in result.dice_validation().items():
            is_chosen = int(chosen.get(run.variant) == run.trial)
            yield (run.study, run.variant, run.trial, settings, run.fold, run.seed, site, dice, is_chosen)


def _run(run: RunFile) -> Row:
    return (run.study, run.variant, run.fold, run.seed)


def _about(result: RunResult) -> Row:
    return (result.steps, round(result.seconds, 1), result.parameters, result.torch, result.fedoap)


def _order(row: Row) -> tuple[tuple[bool, str, float], ...]:
    """Return the key that rows are sorted by: empty cells first, numbers as numbers."""
    return tuple(
        (cell is not None, cell, 0.0) if isinstance(cell, str) else (cell is not None, "", cell or 0.0) for cell in row
    )


def _write(path: Path, rows: Iterable[Row]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([_shown(cell) for cell in row] for row in rows)
    part = path.with_suffix(".part")
    part.write_text(text.getvalue(), encoding="utf-8")
    part.replace(path)


def _shown(cell: Cell) -> Cell:
    return repr(round(cell, 6)) if isinstance(cell, float) else cell
