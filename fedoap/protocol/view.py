"""How the rounds stand, told to the operator and to the sites: pure functions of the round machine."""

import math
from collections.abc import Sequence
from dataclasses import replace

from fedoap.messages import Idle
from fedoap.protocol.exchange import Exchange
from fedoap.protocol.rounds import MOST_TEXT, Rounds
from fedoap.protocol.status import RunState, SiteState, SiteStatus, Status

MOST_NAMES = 40
"""More would not fit into a message."""


def idle(rounds: Rounds) -> Idle:
    """Return what a site is told that has nothing to do: the end, or for whom everybody waits."""
    return rounds.end or Idle("waiting", _reason(rounds)[:MOST_TEXT])


def status(rounds: Rounds) -> Status:
    """Return how the federation stands."""
    exchange, step, word = rounds.exchange, rounds.step, idle(rounds)
    manifest = exchange.manifest if exchange else None
    opened = rounds.history.open
    committed = frozenset(update.site for update in opened.updates) if opened else frozenset()
    return Status(
        state=_state(word, exchange),
        reason=word.reason,
        kind=step.kind if step else None,
        round=step.round if step else rounds.plan.rounds + 1,
        rounds=rounds.plan.rounds,
        attempt=manifest.attempt if manifest else 0,
        seconds=rounds.now - exchange.opened_at if exchange else 0.0,
        deadline_seconds=max(0.0, exchange.deadline - rounds.now) if exchange else 0.0,
        sites=tuple(_site(rounds, site, site in committed) for site in rounds.config.sites),
    )


def _state(word: Idle, exchange: Exchange | None) -> RunState:
    if word.state != "waiting":
        return word.state
    if exchange is None:
        return "waiting"
    return "open" if exchange.merging is None else "merging"


def _site(rounds: Rounds, site: str, is_committed: bool) -> SiteStatus:
    heard, said, upload = rounds.attendance.last_heard(site), rounds.progress.get(site), rounds.uploads.find(site)
    status = SiteStatus(
        site,
        _site_state(rounds, site, is_committed),
        None if heard is None else rounds.now - heard,
        received=upload.receiver.at if upload else 0,
        size=upload.receiver.blob.size if upload else 0,
        software=rounds.attendance.software(site),
    )
    if said is None:
        return status
    return replace(status, stage=said.stage, step=said.step, steps=said.steps, loss=said.loss, dice=said.dice)


def _site_state(rounds: Rounds, site: str, is_committed: bool) -> SiteState:
    exchange, upload = rounds.exchange, rounds.uploads.find(site)
    if site in rounds.revoked:
        return "revoked"
    if exchange and site in exchange.failed:
        return "failed"
    if is_committed:
        return "committed"
    if rounds.attendance.heard(site) == -math.inf:
        return "absent"
    if rounds.is_silent(site):
        return "silent"
    if upload:
        return "waiting" if upload.state == "waiting" else "uploading"
    is_awaited = exchange is not None and exchange.merging is None and site in exchange.cohort
    return "working" if is_awaited else "idle"


def _reason(rounds: Rounds) -> str:
    exchange = rounds.exchange
    if exchange is None:
        return _reason_to_wait(rounds)
    if exchange.merging is not None:
        failed = f"; merging failed and is tried again: {exchange.merge_reason}" if exchange.merge_failures else ""
        return f"{exchange.step}: merging the results{failed}"
    missing = exchange.missing(rounds.history.open)
    minutes = max(0.0, exchange.deadline - rounds.now) / 60
    return f"{exchange.step}: waiting for {_names(rounds, missing)}, for {minutes:.0f} minutes at most"


def _reason_to_wait(rounds: Rounds) -> str:
    quorum, sites = rounds.config.quorum, rounds.config.sites
    active = [site for site in sites if site in rounds.active]
    if len(active) < quorum:
        return f"quorum is {quorum}, but only {len(active)} of {len(sites)} sites are enrolled and not revoked"
    live = frozenset(rounds.live)
    away = [site for site in sites if site not in live and site not in rounds.revoked]
    if rounds.pause > 0 and len(live) >= quorum:
        last = rounds.history.closed[-1].reason
        return f"{rounds.step} is tried again in {rounds.pause:.0f} s; it failed because {last}"
    return f"{len(live)} of {len(sites)} sites are here, quorum is {quorum}: waiting for {_names(rounds, away)}"


def _names(rounds: Rounds, sites: Sequence[str]) -> str:
    return ", ".join(f"{site}{_absence(rounds, site)}" for site in sites[:MOST_NAMES]) or "nobody"


def _absence(rounds: Rounds, site: str) -> str:
    heard = rounds.attendance.heard(site)
    if heard == -math.inf:
        return " (not here yet)"
    return f" (silent for {rounds.now - heard:.0f} s)" if rounds.is_silent(site) else ""
