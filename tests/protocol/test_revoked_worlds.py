"""Worlds in which every site loses its key while the coordinator comes and goes: only rare schedules make it matter."""

import random
from collections.abc import Iterator

import pytest

from fedoap.protocol.history import History, Record, Revoked
from fedoap.protocol.history import after as history_after
from simulated import schedules
from simulated.memory import many_worlds
from simulated.network import Faults, Spell

SEEDS = 300


@pytest.fixture(autouse=True)
def _cheap() -> Iterator[None]:
    with many_worlds():
        yield


def _run_all() -> None:
    """Run the worlds; raises where an update counts whose key was revoked."""
    for seed in range(SEEDS):
        rng = random.Random(seed)
        spells = tuple(Spell("revoked", rng.random() * 25, 2.0, frozenset({site})) for site in range(3))
        faults = Faults(crash_coordinator=0.02, outage=20.0, work=20.0, spells=spells)
        schedules.run(schedules.ONLY_TRAINING, seed, faults)


def test_no_update_counts_whose_key_was_revoked_whoever_restarts_and_joins_anew() -> None:
    _run_all()


def test_a_coordinator_that_forgets_who_was_revoked_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(history: History, record: Record) -> History:
        return history if isinstance(record, Revoked) else history_after(history, record)

    monkeypatch.setattr("fedoap.protocol.history.after", forgetful)

    with pytest.raises(AssertionError, match="an update counts though its key was revoked"):
        _run_all()
