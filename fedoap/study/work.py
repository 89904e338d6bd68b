"""A site's work in this process outside a federation: alone, as a newcomer, or as one of a pool."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch

from fedoap.config import Plan, SiteConfig
from fedoap.errors import ConfigError, TrainingError
from fedoap.segmentation.calibration import tune_new_site
from fedoap.segmentation.descent import Metrics, Progress, Workplace
from fedoap.segmentation.modelfolder import Predictor, choose_device, read_files, read_record
from fedoap.segmentation.network import Bank
from fedoap.segmentation.sitemodel import SiteModel
from fedoap.simulation.layout import Layout
from fedoap.study.figures import SiteRound
from fedoap_node.job import RESULT, JobResult, write_local_job
from fedoap_node.workshop import Workshop

NEW_SITE_EPOCHS = 2

Report: TypeAlias = Callable[[str, int, Progress], None]
"""Hears of a site's name, the round and how far its work is."""


def train_alone(site: str, config: SiteConfig, plan: Plan, folder: Path, report: Report, *, cache: Path) -> SiteRound:
    """Train a site on its own images only, as the node's worker does, and return its figures.

    Its network lies in the folder then: `fedoap.study.models` finds it.

    Raises:
        FedoapError: the site cannot do its work.
    """
    check_worker(site, config)
    job = write_local_job(site, config, plan, cache, Layout(folder.absolute()).alone(site))
    last = plan.rounds + 1
    with quiet_process():
        Workshop().carry_out(job, lambda progress: report(site, last, progress))
    result = JobResult.model_validate_json((job.output / RESULT).read_bytes())
    return SiteRound(
        site=site,
        stage="local",
        round=last,
        step=int(result.metrics["steps"]),
        cases=result.cases,
        metrics={name: value for name, value in result.metrics.items() if name != "seconds"},
        seconds=result.metrics["seconds"],
    )


def tune_unseen(
    site: str, config: SiteConfig, folder: Path, report: Report, *, cache: Path, epochs: int = NEW_SITE_EPOCHS
) -> tuple[Predictor, Metrics]:
    """Return the shared model of a federation's folder after some epochs at a site that took no part.

    Raises:
        FedoapError: the site cannot do its work.
    """
    record = read_record(Layout(folder.absolute()).model / "model.json")
    last = record.plan.rounds + 1
    with quiet_process(config.worker.threads):
        place = workplace(site, config, record.plan, lambda progress: report(site, last, progress), cache=cache)
        model = SiteModel(record.plan)
        model.load_shared(read_files(record.shared))
        bank = Bank.from_arrays(read_files(record.bank), place.device) if record.bank else None
        network, metrics = tune_new_site(model.to(place.device), bank, place, epochs)
    return Predictor(record.plan, network.eval(), bank, place.device), metrics


def workplace(
    site: str, config: SiteConfig, plan: Plan, report: Callable[[Progress], None], *, cache: Path
) -> Workplace:
    """Return where a site works: its cases, this process and its device.

    Raises:
        ConfigError: the site wants a worker of its own, or a device that is not here.
        DataError: its datalist is wrong.
    """
    check_worker(site, config)
    if config.data is None:
        raise TrainingError(f"site {site}: data is missing")
    device = choose_device(config.worker.device)
    return Workplace.open(site, plan, config.data, cache=cache.absolute(), device=device, report=report)


def check_worker(site: str, config: SiteConfig) -> None:
    """Return if the site's work can be done in this process.

    Raises:
        ConfigError: it names a program of its own, or several GPUs.
    """
    if config.worker.command is not None:
        raise ConfigError(f"site {site}: worker.command is given, but a study runs fedoap's own worker; leave it out")
    if config.worker.gpus > 1:
        raise ConfigError(f"site {site}: worker.gpus is {config.worker.gpus}, but a study trains a site on one")


@contextmanager
def quiet_process(threads: int = 0) -> Iterator[None]:
    """Within the context PyTorch has so many threads, or what the job chooses; after it, as many as before."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
