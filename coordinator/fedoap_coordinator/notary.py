"""Writes the record of an exchange that is over, from what the ledger holds of it, and signs it.

`verify` writes the same record anew from the ledger's rows and compares: what differs was altered.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fedoap.aggregation import site_weight
from fedoap.chain import Outcome, RoundRecord, Weighed
from fedoap.config import Plan
from fedoap.identity import ROUND_CONTEXT, sign
from fedoap.manifests import TaskKind, TaskManifest, UploadManifest
from fedoap.strategies import server_words


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed upload as the ledger has it; `stored` is Unix time in seconds."""

    upload: bytes
    manifest: UploadManifest
    stored: float
    counted: bool


@dataclass(frozen=True, slots=True)
class Closing:
    """All that the ledger holds of an exchange that is over; ids are empty where there is no blob."""

    task: bytes
    manifest: TaskManifest
    opened: float
    closed: float
    outcome: Outcome
    reason: str
    uploads: tuple[Committed, ...]
    result: bytes = b""
    exact: bytes = b""


@dataclass(frozen=True, slots=True)
class Notary:
    """Who signs a federation's records, and for which plan and software."""

    plan: Plan
    software: str
    signing_key: bytes = field(repr=False)

    def sign(self, closing: Closing, number: int, previous: bytes) -> tuple[RoundRecord, bytes]:
        """Return the record that comes after the one of id `previous`, and its signature."""
        record = describe(closing, self.plan, self.software, number, previous)
        return record, sign(self.signing_key, ROUND_CONTEXT, record.pack())


Sign = Callable[[Closing, int, bytes], tuple[RoundRecord, bytes]]


def describe(closing: Closing, plan: Plan, software: str, number: int, previous: bytes) -> RoundRecord:
    """Return the record of an exchange that is over."""
    manifest = closing.manifest
    return RoundRecord(
        federation=manifest.federation,
        number=number,
        previous=previous,
        task=closing.task,
        kind=manifest.kind,
        round=manifest.round,
        attempt=manifest.attempt,
        plan=manifest.plan,
        model=manifest.model.id if manifest.model else b"",
        bank=manifest.bank.id if manifest.bank else b"",
        opened=closing.opened,
        closed=closing.closed,
        outcome=closing.outcome,
        reason=closing.reason,
        rule=rule(manifest.kind, plan) if closing.outcome == "done" else "none",
        counted=_weighed((one for one in closing.uploads if one.counted), manifest.kind, plan),
        left_out=_weighed((one for one in closing.uploads if not one.counted), None, plan),
        result=closing.result,
        exact=closing.exact,
        software=software,
    )


def rule(kind: TaskKind, plan: Plan) -> str:
    """Return in words how uploads of a kind become a result.

    >>> rule("train", Plan(federation="demo"))
    'mean, weighting uniform, server_learning_rate 1.0'
    >>> from fedoap.config import StrategyConfig
    >>> rule("train", Plan(federation="demo", strategy=StrategyConfig(rule="median", max_norm_ratio=3)))
    'median, weighting uniform, server_learning_rate 1.0, max_norm_ratio 3.0'
    >>> rule("train", Plan(federation="demo", strategy=StrategyConfig(name="fedavgm")))
    'mean, weighting uniform, server fedavgm, server_learning_rate 1.0, server_beta1 0.9'
    """
    match kind:
        case "init":
            return "the only upload as it is"
        case "seed" | "bank":
            return "sums of keys and values by slot"
        case "calibrate":
            return "metrics only"
        case "train":
            strategy = plan.strategy
            trim = f", trim_fraction {strategy.trim_fraction}" if strategy.rule == "trimmed_mean" else ""
            bound = f", max_norm_ratio {strategy.max_norm_ratio}" if strategy.max_norm_ratio is not None else ""
            return f"{strategy.rule}{trim}, weighting {strategy.weighting}, {server_words(strategy)}{bound}"


def _weighed(uploads: Iterable[Committed], kind: TaskKind | None, plan: Plan) -> tuple[Weighed, ...]:
    return tuple(
        Weighed(one.manifest.site, one.upload, one.manifest.cases, _weight(one, kind, plan), one.stored)
        for one in sorted(uploads, key=lambda one: one.manifest.site)
    )


def _weight(one: Committed, kind: TaskKind | None, plan: Plan) -> float:
    match kind:
        case None | "calibrate":
            return 0.0
        case "train":
            return site_weight(one.manifest, plan.strategy)
        case _:
            return 1.0
