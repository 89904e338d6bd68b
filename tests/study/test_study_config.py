"""The file of a study: every mistake is one line, before anything runs."""

import json
from pathlib import Path

import pytest

from fedoap.errors import ConfigError, DataError
from fedoap.study.config import Study
from fedoap.study.grid import Grid
from fedoap.study.lists import write_lists
from fedoap.study.search import check_trials, trials, variants_in_order
from study_files import BASE, write_study

GOOD = """
name = "s"
base = "simulate.toml"
folds = 2
seeds = [0, 7]
[variants.fedavg.federation]
strategy.name = "fedavg"
network.attention = "projection"
[variants.fedoap]
"""
SEARCH = GOOD + "[search]\ntrials = 2\n[search.settings]\n"


def test_a_variant_is_the_base_with_its_changes(tmp_path: Path) -> None:
    """Planted bug: tables replaced instead of merged."""
    study = write(tmp_path, GOOD)

    fedavg, fedoap = study.simulation("fedavg").federation, study.simulation("fedoap").federation

    assert (fedavg.strategy.name, fedoap.strategy.name) == ("fedavg", "fedoap")
    assert (fedavg.network.attention, fedoap.network.attention) == ("projection", "joint")
    assert fedavg.network.width == fedoap.network.width == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[other]\n" + GOOD, "study.toml: unknown key other"),
        (GOOD.replace("folds", "fold"), "unknown key fold; did you mean folds?"),
        (GOOD.replace("folds = 2", "folds = 1"), "folds is 1, but cross-validation needs 2"),
        (GOOD.replace("[0, 7]", "[7, 7]"), "seeds is [7, 7], but each may occur once"),
        (GOOD.replace("simulate.toml", "no.toml"), "no.toml: no such file"),
        (GOOD.replace("strategy.name", "strategy.nam"), "variants.fedavg: unknown key federation.strategy.nam; did"),
        (GOOD.replace('"fedavg"', '"fedavgg"'), "variants.fedavg: strategy.name is fedavgg, which is no known"),
        (GOOD.replace('"projection"', '"both"'), "variants.fedavg: federation.network.attention is 'both', but"),
        (GOOD + 'sites.a.data.datalist = "b.json"', "variants.fedoap: a.data names other images than the base"),
        (GOOD + 'sites.d.data.datalist = "b.json"', "variants.fedoap: d is no site of the base"),
        (GOOD + '[sizes]\nsite = "x"', "sizes.site is x, but the sites are a, b"),
        (GOOD + '[sizes]\nsite = "a"\nvariants = ["x"]', "sizes.variants names x, but the variants are fedavg"),
        (GOOD + "[partition.x.x1]\nshare = 0.5", "partition names x, but the base has a, b"),
        ('sites = ["a", "x"]' + GOOD, "sites names x, but the base has a, b"),
        ('sites = ["b"]' + GOOD + "[partition.a.a1]\nshare = 0.5", "partition names a, but sites leaves it out"),
        (GOOD + "[partition.a.b]\nshare = 0.5", "partition makes a site b, but there is another"),
        (GOOD + "[partition.a.a1]\nshare = 0.7\n[partition.a.a2]\nshare = 0.4", "partition.a shares out 1.1"),
        (GOOD + "[partition.a.a1]\nshare = 0.7\nresolution = 0.1", "partition.a.a1.resolution is 0.1, but"),
        (SEARCH, "search.variants.fedavg combines to 1 settings, but each variant has search.trials = 2"),
        (SEARCH + '"federation.training.learning_rte" = [1, 2]', "unknown key federation.training.learning_rte"),
        (SEARCH + '"federation.training.learning_rate" = [1, -2]', "variants.fedavg: federation.training.learning_ra"),
        (GOOD + '[search]\ntrials = 1\nlike = { x = "fedoap" }', "search.like names x, but the variants are"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_trials(write(tmp_path, text))

    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_known_variants_can_be_asked_for(tmp_path: Path) -> None:
    study = write(tmp_path, GOOD)

    assert list(variants_in_order(study, ("fedoap", "fedavg"))) == ["fedavg", "fedoap"]
    with pytest.raises(ConfigError, match="--only names fedprox, but the variants are fedavg, fedoap"):
        list(variants_in_order(study, ("fedprox",)))


def test_every_variant_has_as_many_trials(tmp_path: Path) -> None:
    """Planted bug: all that a variant's settings combine to."""
    rates = '"federation.training.learning_rate" = [1e-3, 2e-3]\n'
    more = '[search.variants.fedavg]\n"federation.strategy.server_learning_rate" = [0.5, 1.0]'
    study = write(tmp_path, SEARCH + rates + more)

    drawn = {name: trials(study, name) for name in study.config.variants}

    assert [len(each) for each in drawn.values()] == [2, 2]
    assert all(len(settings) == 2 for settings in drawn["fedavg"])
    assert drawn["fedoap"] == ({"federation.training.learning_rate": 1e-3}, {"federation.training.learning_rate": 2e-3})


def test_a_changed_variant_alone_is_made_anew(tmp_path: Path) -> None:
    """Planted bugs: a digest of the whole file; a digest without the datalists."""

    def digests(text: str, cases: int = 6) -> dict[str, str]:
        grid = Grid(study := write(tmp_path, text, cases), write_lists(study, tmp_path / "data"))
        return {run.name: run.digest for name in study.config.variants for run in grid.runs(name, {})}

    before = digests(GOOD)
    changed = digests(GOOD.replace('"projection"', '"off"'))
    other_cases = digests(GOOD, cases=7)

    assert {name for name in before if changed[name] != before[name]} == {n for n in before if n.startswith("fedavg")}
    assert all(other_cases[name] != before[name] for name in before)
    assert len(before) == len(set(before.values())) == 8


def test_a_moved_folder_changes_no_digest(tmp_path: Path) -> None:
    """Planted bug: a digest over the datalists' paths."""
    found = []
    for place in ("here", "there"):
        study = write(tmp_path / place, GOOD)
        (run, *_) = Grid(study, write_lists(study, tmp_path / place / "data")).runs("fedoap", {})
        found.append(run.digest)

    assert found[0] == found[1]


def test_derived_datalists_name_no_patient(tmp_path: Path) -> None:
    """Planted bug: the datalist's own patient."""
    study = write(tmp_path, GOOD)

    lists = write_lists(study, tmp_path / "data")

    listed = json.loads(lists.of(1, "a").path.read_text())
    every = [row for rows in listed.values() for row in rows]
    assert {row["patient"] for row in every} <= {str(number) for number in range(6)}
    assert sorted(int(row["name"]) for row in every) == list(range(12))
    assert (len(listed["training"]), len(listed["validation"]), len(listed["test"])) == (4, 2, 6)


def test_a_site_with_too_few_patients_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="site a: 3 patients cannot make 2 folds"):
        write_lists(write(tmp_path, GOOD, cases=3), tmp_path / "data")


def write(folder: Path, text: str, cases: int = 6) -> Study:
    """Return the study of this text over the usual base."""
    return write_study(folder, BASE, text, cases)
