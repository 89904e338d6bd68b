"""The course of a study: what is run, what is left alone, and what stands in its tables."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from fedoap.errors import ConfigError
from fedoap.study import runner
from fedoap.study.folder import open_folder
from fedoap.study.runner import Options, Outcome, run_study
from fedoap.study.table import COLUMNS
from instant_runs import Instant, KilledError
from study_files import BASE, write_study

STUDY = """
name = "s"
base = "simulate.toml"
folds = 2
seeds = [0, 7]
[variants.fedavg.federation]
strategy.name = "fedavg"
network.attention = "projection"
[variants.fedoap]
"""
SEARCH = """
[search]
trials = 2
[search.settings]
"federation.training.learning_rate" = [1e-3, 2e-3]
"""
SIZES = """
[sizes]
site = "a"
cases = [2, 3, 100]
variants = ["fedoap"]
"""


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.0)


def test_every_variant_runs_on_every_fold_with_every_seed(tmp_path: Path) -> None:
    executor = Instant()

    outcome = go(tmp_path, STUDY, executor)

    names = {f"{variant}-f{fold}-s{seed}" for variant in ("fedavg", "fedoap") for fold in (0, 1) for seed in (0, 7)}
    assert set(executor.started) == names
    assert (outcome.done, outcome.left, outcome.failed) == (8, 0, [])
    assert {path.name for path in (tmp_path / "out" / "runs").iterdir()} == names
    assert not any((tmp_path / "out" / "work").iterdir())


def test_tables_have_the_columns_of_their_documentation(tmp_path: Path) -> None:
    """Planted bugs: a column left out; rows not sorted."""
    go(tmp_path, STUDY + SEARCH, Instant())

    for name, columns in COLUMNS.items():
        header, *rows = csv.reader(io.StringIO((tmp_path / "out" / name).read_text()))
        assert tuple(header) == columns
        assert {len(row) for row in rows} == {len(columns)}
    cases = table(tmp_path, "cases.csv")
    assert [row["case"] for row in cases[:4]] == ["9", "10", "9", "10"]
    assert [row["site"] for row in cases[:4]] == ["a", "a", "b", "b"]
    assert len(cases) == 8 * 2 * 2


@pytest.mark.parametrize("killed_after", range(13))
def test_a_killed_study_goes_on_and_ends_in_the_same_tables(tmp_path: Path, killed_after: int) -> None:
    """Planted bugs: a run that counts as done before its figures are there; trials that are chosen from too early."""
    text = STUDY + SEARCH
    go(tmp_path / "whole", text, Instant())
    first = Instant(killed_after=killed_after)

    try:
        go(tmp_path / "killed", text, first)
    except KilledError:
        kept = {path.name for path in (tmp_path / "killed" / "out").glob("runs/*")}
        second = Instant()
        go(tmp_path / "killed", text, second)
        assert not kept & set(second.started)
        assert len(kept) + len(second.started) == 12

    for name in COLUMNS:
        assert (tmp_path / "killed" / "out" / name).read_bytes() == (tmp_path / "whole" / "out" / name).read_bytes()


def test_a_changed_variant_alone_runs_again(tmp_path: Path) -> None:
    """Planted bug: a digest that is not looked at."""
    go(tmp_path, STUDY, Instant())
    executor = Instant()

    go(tmp_path, STUDY.replace('"projection"', '"off"'), executor)

    assert sorted(executor.started) == [f"fedavg-f{fold}-s{seed}" for fold in (0, 1) for seed in (0, 7)]


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    """Planted bug: a study that ends at the first failure."""
    text = io.StringIO()

    outcome = go(tmp_path, STUDY, Instant(lambda run: "no memory" if run.name == "fedavg-f0-s0" else None), shown=text)

    assert (outcome.done, outcome.left, outcome.failed) == (7, 0, ["fedavg-f0-s0"])
    assert "fedavg-f0-s0 failed: no memory\n" in text.getvalue()
    assert len(table(tmp_path, "runs.csv")) == 7


def test_damaged_figures_are_told_and_not_taken_for_none(tmp_path: Path) -> None:
    """Planted bug: a run that is begun anew without a word."""
    go(tmp_path, STUDY, Instant())
    (tmp_path / "out" / "runs" / "fedavg-f0-s0" / "result.json").write_text("{")

    with pytest.raises(ConfigError, match=r"fedavg-f0-s0/result.json: is damaged: .* delete .* to run it again"):
        go(tmp_path, STUDY, Instant())


def test_the_trial_with_the_best_validation_dice_is_used(tmp_path: Path) -> None:
    """Planted bugs: the first trial; the trial's own fold only."""
    go(tmp_path, STUDY + SEARCH, Instant())

    chosen = [row for row in table(tmp_path, "tuning.csv") if row["chosen"] == "1"]
    assert {row["settings"] for row in chosen} == {'{"federation.training.learning_rate": 0.002}'}
    assert {(row["variant"], row["site"]) for row in chosen} == {(v, s) for v in ("fedavg", "fedoap") for s in "ab"}
    with open_folder(tmp_path / "out", "s") as folder:
        runs = [path.read_text() for path in folder.out.glob("runs/*-f[01]-s[07]/run.json")]
    assert len(runs) == 8
    assert all('"learning_rate":0.002' in text.replace(" ", "") for text in runs)


def test_a_variant_may_take_over_what_another_ones_trials_chose(tmp_path: Path) -> None:
    """Planted bug: the settings of its own trials, of which it has none."""
    executor = Instant()

    go(tmp_path, STUDY + SEARCH.replace("[search.settings]", 'like.fedavg = "fedoap"\n[search.settings]'), executor)

    assert [name for name in executor.started if "-t" in name] == ["fedoap-f0-s0-t0", "fedoap-f0-s0-t1"]
    assert len(executor.started) == 2 + 8
    runs = [path.read_text() for path in (tmp_path / "out").glob("runs/fedavg-*/run.json")]
    assert all('"learning_rate":0.002' in text.replace(" ", "") for text in runs)


def test_a_failed_trial_keeps_its_variant_from_the_grid(tmp_path: Path) -> None:
    """Planted bug: the best of the trials that are left."""
    executor = Instant(lambda run: "no" if run.trial == 1 and run.variant == "fedavg" else None)

    outcome = go(tmp_path, STUDY + SEARCH, executor)

    assert (outcome.done, outcome.left, outcome.failed) == (3 + 4, 4, ["fedavg-f0-s0-t1"])
    assert not [name for name in executor.started if name.startswith("fedavg") and "-t" not in name]


def test_a_site_with_fewer_cases_stands_beside_the_grid(tmp_path: Path) -> None:
    """Planted bugs: rows of the sites that were not cut; a cut to more cases than there are."""
    executor = Instant()

    go(tmp_path, STUDY + SIZES, executor)

    cut = [row for row in table(tmp_path, "cases.csv") if row["training_cases"] != "4"]
    assert {(row["variant"], row["site"], row["training_cases"]) for row in cut} == {
        ("fedoap", "a", "2"),
        ("fedoap", "a", "3"),
    }
    assert len(executor.started) == 8 + 2 * 4
    assert len(table(tmp_path, "cases.csv")) == 8 * 2 * 2 + 2 * 4 * 2
    assert len(table(tmp_path, "runs.csv")) == 8


def test_only_the_variants_that_are_asked_for_are_run(tmp_path: Path) -> None:
    """Those that are done already stay in the tables. Planted bug: tables of what was asked for."""
    go(tmp_path, STUDY, Instant(), only=("fedavg",))
    executor = Instant()

    go(tmp_path, STUDY, executor, only=("fedoap",))

    assert {name.split("-")[0] for name in executor.started} == {"fedoap"}
    assert len(table(tmp_path, "runs.csv")) == 8


def test_no_run_is_started_after_the_time_is_up(tmp_path: Path) -> None:
    executor = Instant()

    outcome = go(tmp_path, STUDY, executor, until_minutes=0)

    assert (executor.started, outcome.done, outcome.left) == ([], 0, 8)


def test_a_folder_is_one_studys_and_one_processs(tmp_path: Path) -> None:
    """Planted bugs: no lock; another study's marker passed over."""
    go(tmp_path, STUDY, Instant())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()

    with pytest.raises(ConfigError, match="is the folder of study s, not of t"):
        go(tmp_path, STUDY.replace('"s"', '"t"'), Instant())
    with (
        pytest.raises(ConfigError, match="not empty and not the folder of a study"),
        open_folder(tmp_path / "thesis", "s"),
    ):
        pass
    with open_folder(tmp_path / "out", "s"), pytest.raises(ConfigError, match="is at work"):
        go(tmp_path, STUDY, Instant())


def go(
    folder: Path,
    text: str,
    executor: Instant,
    *,
    only: tuple[str, ...] = (),
    until_minutes: float | None = None,
    shown: io.StringIO | None = None,
) -> Outcome:
    """Carry the study of this text out, as a new process would."""
    options = Options(jobs=2, only=only, until_minutes=until_minutes)
    console = Console(file=shown or io.StringIO())
    return run_study(write_study(folder, BASE, text), folder / "out", options, console, executor)


def table(folder: Path, name: str) -> list[dict[str, str]]:
    """Return a table's rows."""
    return list(csv.DictReader(io.StringIO((folder / "out" / name).read_text())))
