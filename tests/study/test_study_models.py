"""What a run left can be asked case by case, and gives the figures that the run itself gave."""

import math
from pathlib import Path

import pytest
import torch

from fedoap.apply import Source, evaluate_split
from fedoap.config import SiteConfig
from fedoap.segmentation.datalist import Split
from fedoap.segmentation.modelfolder import Predictor
from fedoap.simulation.config import SimulationConfig
from fedoap.simulation.layout import write_site
from fedoap.study.figures import FederationRun
from fedoap.study.models import Models, evaluate_cases, parameters
from fedoap.study.work import train_alone, tune_unseen
from tiny_study import no_report

Ran = tuple[Path, FederationRun]


def test_a_sites_model_gives_case_by_case_what_its_calibration_reported(config: SimulationConfig, ran: Ran) -> None:
    """Planted bug: the state before calibration is the one after it."""
    folder, run = ran
    said, models = run.rounds[-1].metrics, Models(folder, "cpu")

    final = _dice(models.final("b"), config.sites["b"], "validation", folder)
    before = _dice(models.before("b"), config.sites["b"], "validation", folder)

    assert run.rounds[-1].site == "b"
    assert said["dice_validation"] > said["dice_validation_before"] > 0
    assert final == pytest.approx(said["dice_validation"], abs=1e-6)
    assert before == pytest.approx(said["dice_validation_before"], abs=1e-6)


def test_each_case_has_its_place_in_its_list_and_all_four_measures(config: SimulationConfig, ran: Ran) -> None:
    folder, run = ran

    cases = evaluate_cases(Models(folder, "cpu").final("b"), config.sites["b"], "test", cache=folder / "cache")

    said = run.rounds[-1].metrics
    assert [case.position for case in cases] == [0, 1]
    assert len({case.name for case in cases}) == 2
    for measure in ("dice", "iou", "hd95", "nsd"):
        mean = math.fsum(getattr(case.scores, measure) for case in cases) / 2
        assert mean == pytest.approx(said[f"{measure}_test"])


def test_an_unseen_site_gets_the_shared_model_as_the_command_gives_it(
    config: SimulationConfig, ran: Ran, tmp_path: Path
) -> None:
    """Planted bug: another list than the one asked for."""
    folder, _ = ran
    write_site(tmp_path / "c.toml", config.unseen["c"])
    source = Source(model=folder / "model", config=tmp_path / "c.toml", threads=1)

    ours = evaluate_cases(Models(folder, "cpu").shared(), config.unseen["c"], "validation", cache=folder / "cache")

    theirs = evaluate_split(source, "validation", tmp_path / "c.json", None)
    assert [(case.name, case.scores) for case in ours] == [(case.name, case.scores) for case in theirs.cases]


def test_a_new_site_starts_from_the_shared_model_and_trains_so_many_epochs(config: SimulationConfig, ran: Ran) -> None:
    """Planted bugs: the personal parts start as the plan's seed made them; steps that ignore the epochs."""
    folder, _ = ran
    site, cache = config.unseen["c"], folder / "cache"

    tuned, metrics = tune_unseen("c", site, folder, no_report, cache=cache)
    untouched, none = tune_unseen("c", site, folder, no_report, cache=cache, epochs=0)

    shared, image = Models(folder, "cpu").shared(), torch.rand(2, 1, 32, 32)
    assert shared.bank is not None
    torch.testing.assert_close(untouched(image), shared(image))
    before = _dice(shared, site, "validation", folder)
    assert (metrics["steps"], none["steps"]) == (4.0, 0.0)  # 2 epochs of 4 cases, 2 a batch
    assert metrics["dice_validation_before"] == pytest.approx(before, abs=1e-6)
    assert _dice(tuned, site, "validation", folder) == pytest.approx(metrics["dice_validation"], abs=1e-6)


def test_training_alone_leaves_a_network_that_gives_its_figures(
    config: SimulationConfig, ran: Ran, tmp_path: Path
) -> None:
    folder, _ = ran
    row = train_alone("b", config.sites["b"], config.plan, tmp_path, no_report, cache=folder / "cache")

    alone = Models(tmp_path, "cpu").alone("b")

    assert (row.site, row.stage, row.step, row.bytes_sent) == ("b", "local", 9, 0)
    assert alone.bank is None
    assert _dice(alone, config.sites["b"], "validation", folder) == pytest.approx(row.metrics["dice_validation"])


def test_parameters_are_those_of_one_network(config: SimulationConfig, ran: Ran) -> None:
    network = Models(ran[0], "cpu").final("a").network

    assert parameters(config.plan) == sum(one.numel() for one in network.parameters())


def _dice(predict: Predictor, site: SiteConfig, split: Split, folder: Path) -> float:
    cases = evaluate_cases(predict, site, split, cache=folder / "cache")
    return math.fsum(case.scores.dice for case in cases) / len(cases)
