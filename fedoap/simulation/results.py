"""The figures of a simulation, gathered from what its processes left."""

from pathlib import Path

from pydantic import ValidationError

from fedoap.errors import ProcessError
from fedoap.report.results import EvaluationFile, Ledger, Results, SiteResult, UnseenResult, from_ledger
from fedoap.simulation.config import SimulationConfig
from fedoap.simulation.layout import Layout
from fedoap_node.job import RESULT, JobResult


def collect(config: SimulationConfig, ledger: str, layout: Layout, *, seconds: float) -> Results:
    """Return all figures: the ledger's, those of training alone, and those of unseen sites.

    Raises:
        ProcessError: no site finished its calibration.
    """
    try:
        known = from_ledger(Ledger.model_validate_json(ledger))
    except ValidationError as error:
        raise ProcessError(f"results of the coordinator: {error.errors(include_url=False)[0]['msg']}") from None
    if not any(site.metrics for site in known.sites.values()):
        raise ProcessError("the federation ended without a calibration; see the coordinator's log.jsonl")
    return known.model_copy(
        update={
            "seconds": round(seconds, 1),
            "sites": {
                name: _site(known.sites[name], layout.alone(name)) for name in config.sites if name in known.sites
            },
            "unseen": {name: _unseen(name, layout) for name in config.unseen},
            "plan": config.plan,
        }
    )


def _site(known: SiteResult, alone: Path) -> SiteResult:
    if not (alone / RESULT).exists():
        return known
    metrics = JobResult.model_validate_json((alone / RESULT).read_bytes()).metrics
    return known.model_copy(update={"dice_local": metrics.get("dice_test"), "metrics_local": metrics})


def _unseen(name: str, layout: Layout) -> UnseenResult:
    evaluation = EvaluationFile.model_validate_json(layout.evaluation(name).read_bytes())
    return UnseenResult(dice=evaluation.mean.dice, metrics=evaluation.mean.model_dump())
