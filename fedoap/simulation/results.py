"""The figures of a simulation, gathered from what its processes left."""

from pydantic import ValidationError

from fedoap import __version__
from fedoap.errors import ProcessError
from fedoap.report.results import EvaluationFile, Exchange, Ledger, Results, SiteResult, UnseenResult
from fedoap.simulation.config import SimulationConfig
from fedoap.simulation.layout import Layout
from fedoap_node.job import RESULT, JobResult


def collect(config: SimulationConfig, ledger: str, layout: Layout, *, seconds: float) -> Results:
    """Return all figures: the ledger's, those of training alone, and those of unseen sites.

    Raises:
        ProcessError: no site finished its calibration.
    """
    try:
        exchanges = Ledger.model_validate_json(ledger).exchanges
    except ValidationError as error:
        raise ProcessError(f"results of the coordinator: {error.errors(include_url=False)[0]['msg']}") from None
    last = _last(exchanges)
    sites = {name: _site(name, last.sites[name].metrics, layout) for name in config.sites if name in last.sites}
    return Results(
        federation=config.federation.federation,
        software=f"fedoap {__version__}",
        rounds=sum(each.kind == "train" and each.outcome == "done" for each in exchanges),
        seconds=round(seconds, 1),
        sites=sites,
        unseen={name: _unseen(name, layout) for name in config.unseen},
        exchanges=exchanges,
        plan=config.plan,
    )


def _last(exchanges: tuple[Exchange, ...]) -> Exchange:
    for each in reversed(exchanges):
        if each.kind == "calibrate" and each.outcome == "done":
            return each
    raise ProcessError("the federation ended without a calibration; see the coordinator's log.jsonl")


def _site(name: str, metrics: dict[str, float], layout: Layout) -> SiteResult:
    alone = layout.alone(name) / RESULT
    local = JobResult.model_validate_json(alone.read_bytes()).metrics if alone.exists() else {}
    return SiteResult(
        dice=metrics["dice_test"], dice_local=local.get("dice_test"), metrics=metrics, metrics_local=local
    )


def _unseen(name: str, layout: Layout) -> UnseenResult:
    evaluation = EvaluationFile.model_validate_json(layout.evaluation(name).read_bytes())
    return UnseenResult(dice=evaluation.mean.dice, metrics=evaluation.mean.model_dump())
