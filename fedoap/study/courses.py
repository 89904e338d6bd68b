"""What one run does, by its strategy: a federation, each site alone, or all images pooled; then the tests.

A course first trains everything and then yields the models to test, by site and stage.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedoap.config import Plan
from fedoap.segmentation.calibration import alone_plan, tune_new_site
from fedoap.segmentation.descent import Metrics, Progress, Workplace
from fedoap.segmentation.modelfolder import Predictor
from fedoap.segmentation.pooled import train_pooled, tune_pooled
from fedoap.segmentation.sitemodel import SiteModel
from fedoap.simulation.config import SimulationConfig
from fedoap.study.federation import run_federation
from fedoap.study.figures import SiteRound
from fedoap.study.gallery import write_gallery
from fedoap.study.models import Models, evaluate_cases
from fedoap.study.result import CaseRow, RoundRow, TestStage
from fedoap.study.work import NEW_SITE_EPOCHS, Report, train_alone, tune_unseen, workplace


@dataclass(frozen=True, slots=True)
class Task:
    """A run's simulation, folders for its models and its pictures, and where prepared cases are kept."""

    config: SimulationConfig
    folder: Path
    gallery: Path
    cache: Path
    report: Report

    def place(self, site: str, plan: Plan) -> Workplace:
        """Return where a site, unseen ones too, works.

        Raises:
            FedoapError: the site cannot do its work here.
        """

        def report(progress: Progress) -> None:
            self.report(site, plan.rounds + 1, progress)

        described = self.config.sites.get(site) or self.config.unseen[site]
        return workplace(site, described, plan, report, cache=self.cache)


class Course(Protocol):
    """A strategy's training, done once, and the models that it left."""

    def train(self) -> list[RoundRow]:
        """Train, and return each site's figures."""

    def models(self, site: str) -> Iterator[tuple[TestStage, Predictor]]:
        """Yield what is to be tested at a site that was trained on."""

    def unseen(self, site: str) -> Iterator[tuple[TestStage, Predictor]]:
        """Yield what is to be tested at a site that was not."""


def course_of(task: Task) -> Course:
    """Return the course that the strategy takes."""
    match task.config.federation.strategy.name:
        case "local":
            return Alone(task)
        case "pooled":
            return Pooled(task)
        case _:
            return Federated(task)


def tested(task: Task, course: Course) -> Iterator[CaseRow]:
    """Yield the figures of all test cases, those of unseen sites too.

    Raises:
        FedoapError: a test case is wrong, or an unseen site cannot do its work.
    """
    for site in task.config.sites:
        for stage, predict in course.models(site):
            yield from _measured(task, site, stage, predict)
    for site in task.config.unseen:
        for stage, predict in course.unseen(site):
            yield from _measured(task, site, stage, predict)


@dataclass(frozen=True, slots=True)
class Federated:
    """All strategies of the protocol."""

    task: Task

    def train(self) -> list[RoundRow]:
        """Run the federation."""
        run = run_federation(self.task.config, self.task.folder, self.task.report, cache=self.task.cache)
        return [_row(each) for each in run.rounds]

    def models(self, site: str) -> Iterator[tuple[TestStage, Predictor]]:
        """Yield the shared model and the site's own, as it was before its calibration and as it is."""
        models = Models(self.task.folder)
        yield "before", models.before(site)
        yield "shared", models.shared()
        yield "final", models.final(site)

    def unseen(self, site: str) -> Iterator[tuple[TestStage, Predictor]]:
        """Yield the shared model as it is, and tuned briefly at the site."""
        yield "zero_shot", Models(self.task.folder).shared()
        described = self.task.config.unseen[site]
        tuned, _ = tune_unseen(site, described, self.task.folder, self.task.report, cache=self.task.cache)
        yield "tuned", tuned


@dataclass(frozen=True, slots=True)
class Alone:
    """Each site on its own images only: the lower bound."""

    task: Task

    def train(self) -> list[RoundRow]:
        """Train one site after the other."""
        task = self.task
        return [
            _row(train_alone(name, site, task.config.plan, task.folder, task.report, cache=task.cache))
            for name, site in task.config.sites.items()
        ]

    def models(self, site: str) -> Iterator[tuple[TestStage, Predictor]]:
        """Yield the site's network."""
        yield "final", Models(self.task.folder).alone(site)

    def unseen(self, site: str) -> Iterator[tuple[TestStage, Predictor]]:
        """Yield what the site reaches without help: the initial weights, tuned as briefly as a federation's model."""
        place = self.task.place(site, alone_plan(self.task.config.plan))
        network, _ = tune_new_site(SiteModel(place.plan).to(place.device), None, place, NEW_SITE_EPOCHS)
        yield "tuned", Predictor(place.plan, network.eval(), None, place.device)


@dataclass(slots=True)
class Pooled:
    """All sites' images in one place, then calibrated at each: the upper bound."""

    task: Task
    _model: SiteModel | None = None
    _calibrated: dict[str, Predictor] = field(default_factory=dict)

    def train(self) -> list[RoundRow]:
        """Train one model on all images, then calibrate it at one site after the other."""
        plan = self.task.config.plan
        places = {name: self.task.place(name, plan) for name in self.task.config.sites}
        began = time.monotonic()
        self._model, metrics = train_pooled(list(places.values()))
        seconds = (time.monotonic() - began) / len(places)
        return [row for place in places.values() for row in self._calibrate(place, metrics, seconds)]

    def models(self, site: str) -> Iterator[tuple[TestStage, Predictor]]:
        """Yield the model of all sites' images, before and after calibration at the site."""
        yield "shared", self._pooled(self.task.place(site, self.task.config.plan))
        yield "final", self._calibrated[site]

    def unseen(self, site: str) -> Iterator[tuple[TestStage, Predictor]]:
        """Yield the model of all sites' images as it is, and tuned briefly at the site."""
        assert self._model is not None, "training comes first"
        place = self.task.place(site, self.task.config.plan)
        yield "zero_shot", self._pooled(place)
        network, _ = tune_new_site(self._model, None, place, NEW_SITE_EPOCHS)
        yield "tuned", Predictor(place.plan, network.eval(), None, place.device)

    def _pooled(self, place: Workplace) -> Predictor:
        assert self._model is not None, "training comes first"
        return Predictor(place.plan, self._model.shared.eval(), None, place.device)

    def _calibrate(self, place: Workplace, pooled: Metrics, seconds: float) -> Iterator[RoundRow]:
        assert self._model is not None, "training comes first"
        began = time.monotonic()
        network, metrics = tune_pooled(self._model, place)
        self._calibrated[place.site] = Predictor(place.plan, network.eval(), None, place.device)
        rounds, steps = place.plan.rounds, int(pooled["steps"])
        yield RoundRow(
            site=place.site,
            stage="pooled",
            round=rounds,
            step=steps,
            loss=pooled["loss"],
            dice_validation=metrics["dice_validation_before"],
            seconds=seconds,
        )
        yield RoundRow(
            site=place.site,
            stage="calibrate",
            round=rounds + 1,
            step=steps + int(metrics["steps"]),
            loss=metrics.get("loss"),
            dice_validation=metrics["dice_validation"],
            seconds=time.monotonic() - began,
        )


def _measured(task: Task, site: str, stage: TestStage, predict: Predictor) -> Iterator[CaseRow]:
    is_unseen = site in task.config.unseen
    described = (task.config.unseen if is_unseen else task.config.sites)[site]
    measures = evaluate_cases(predict, described, "test", cache=task.cache)
    if stage == "final" and described.data is not None:
        write_gallery(task.gallery, site, described.data, predict, measures, cache=task.cache)
    for case in measures:
        yield CaseRow(
            site=site,
            split="unseen" if is_unseen else "test",
            stage=stage,
            case=int(case.name),
            patient=int(case.patient),
            dice=case.scores.dice,
            iou=case.scores.iou,
            hd95_mm=case.scores.hd95,
            nsd=case.scores.nsd,
        )


def _row(of: SiteRound) -> RoundRow:
    return RoundRow(
        site=of.site,
        stage=of.stage,
        round=of.round,
        step=of.step,
        loss=of.metrics.get("loss"),
        dice_validation=of.metrics.get("dice_validation"),
        bytes_sent=of.bytes_sent,
        bytes_received=of.bytes_received,
        seconds=of.seconds,
    )
