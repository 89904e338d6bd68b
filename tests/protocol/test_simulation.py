"""Whole federations in worlds of chance: one seed, one world, and what must hold in each.

`FEDOAP_SIMULATION_SEEDS=100000 pytest tests/protocol/test_simulation.py` looks at more of them, and
`FEDOAP_SIMULATION_FIRST=4711` starts at another seed; a failure names the seed that shows it again.
"""

import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from federation_builders import CHUNK_BYTES, config
from fedoap.config import FederationConfig
from fedoap.protocol.events import Arriving, CoordinatorEffect, SyncPart, Update
from fedoap.protocol.exchange import Exchange, Tally
from fedoap.protocol.hand import Hand
from fedoap.protocol.history import History, OpenExchange, Record
from fedoap.protocol.history import after as history_after
from fedoap.protocol.rounds import Rounds
from fedoap.protocol.uploads import Uploads
from fedoap.seal import TAG_BYTES, Seal
from fedoap.tensors import BlobManifest, TaskManifest
from fedoap.transfer import Admission, Range, Receiver, Sender
from simulated.network import Faults
from simulated.world import World

FIRST = int(os.environ.get("FEDOAP_SIMULATION_FIRST", "1"))
SEEDS = int(os.environ.get("FEDOAP_SIMULATION_SEEDS", "300"))
BATCH = 25
EVERYONE = config(attempts=1000)
TWO_OF_THREE = config(attempts=1000, quorum=2)
ONLY_TRAINING = config(attempts=1000, quorum=2, rounds=4, has_bank=False)


def _run(federation: FederationConfig, seed: int, faults: Faults) -> History:
    try:
        return World(federation, seed, faults).run()
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error}") from error


def _storm(seed: int) -> Faults:
    return Faults.of(random.Random(seed))


@cache
def _undisturbed() -> History:
    return _run(EVERYONE, 0, Faults())


def _check_everyone(seed: int) -> None:
    history = _run(EVERYONE, seed, _storm(seed))
    assert history.model == _undisturbed().model, f"seed {seed}: the final model is another"
    assert history.bank == _undisturbed().bank, f"seed {seed}: the final bank is another"


def test_the_quiet_world_runs_the_course_without_a_second_attempt() -> None:
    closed = _undisturbed().closed

    assert [one.outcome for one in closed] == ["done"] * 6


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, BATCH))
def test_whatever_happens_the_final_model_is_that_of_the_quiet_world(first: int) -> None:
    for seed in range(first, min(first + BATCH, FIRST + SEEDS)):
        _check_everyone(seed)


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS // 5, BATCH))
def test_with_a_quorum_of_two_and_work_that_fails_every_run_ends_and_counts_rightly(first: int) -> None:
    for seed in range(first, min(first + BATCH, FIRST + SEEDS // 5)):
        history = _run(TWO_OF_THREE, seed, replace(_storm(seed), work_fails=0.1))
        assert all(len(one.counted) >= 2 for one in history.closed if one.outcome == "done" and one.kind != "init")


# Machines that are wrong on purpose: each is caught by some of a few seeds.

Plant = Callable[[pytest.MonkeyPatch], None]


def _counts_twice(patch: pytest.MonkeyPatch) -> None:
    def tuple_of_all(self: Exchange, opened: OpenExchange) -> tuple[Update, ...]:
        return (*opened.updates, *opened.updates[:1])

    patch.setattr(Exchange, "counted", tuple_of_all)


def _looks_only_when_something_is_stored(patch: pytest.MonkeyPatch) -> None:
    """The first design of all: a crash between the last commit and the close hangs the round."""

    def never(self: Tally) -> str:
        return "open"

    def stored(self: Rounds, upload: bytes) -> list[object]:
        effects = right_stored(self, upload)
        if self.exchange and self.history.open and len(self.history.open.updates) == len(self.exchange.manifest.cohort):
            patch.setattr(Tally, "outcome", right_outcome)
            effects += self.advance(self.now)
            patch.setattr(Tally, "outcome", never)
        return list(effects)

    right_stored, right_outcome = Rounds.stored, Tally.outcome
    patch.setattr(Tally, "outcome", never)
    patch.setattr(Rounds, "stored", stored)


def _takes_late_uploads(patch: pytest.MonkeyPatch) -> None:
    def anything_goes(self: Rounds, task: bytes, site: str) -> OpenExchange:
        return self.history.open or right(self, task, site)

    right = Rounds.require
    patch.setattr(Rounds, "require", anything_goes)
    # What is sealed for another exchange does not open, so the seal alone would keep late uploads out.
    patch.setattr(Seal, "close", lambda _self, _at, plain: bytes(plain) + bytes(TAG_BYTES))
    patch.setattr(Seal, "open", lambda _self, _at, sealed: bytes(sealed)[:-TAG_BYTES])


def _forgets_credit_at_the_site(patch: pytest.MonkeyPatch) -> None:
    def all_of_it(self: Sender, at: int, upto: int) -> list[Range]:
        return right(self, at, self._size)

    right = Sender.go
    patch.setattr(Sender, "go", all_of_it)
    patch.setattr("fedoap.protocol.uploads.Receiver", _narrow)


def _narrow(blob: BlobManifest, *, at: int, tail: bytes, seal: Seal | None) -> Receiver:
    """A window smaller than the uploads of this test."""
    return Receiver(blob, window_chunks=2, at=at, tail=tail, seal=seal)


def _admits_everyone(patch: pytest.MonkeyPatch) -> None:
    def enter(self: Admission, site: str) -> bool:
        right(self, site)
        return True

    right = Admission.enter
    patch.setattr(Admission, "enter", enter)


def _announces_before_recording(patch: pytest.MonkeyPatch) -> None:
    def open_next(self: Rounds) -> list[object]:
        effects = right(self)
        return [*effects[1:], *effects[:1]]

    right = Rounds._open_next
    patch.setattr(Rounds, "_open_next", open_next)


def _commits_what_is_not_durable(patch: pytest.MonkeyPatch) -> None:
    def holds(self: Rounds, upload: bytes) -> bool:
        return self.uploads.named(upload) is not None

    patch.setattr(Rounds, "holds", holds)


def _forgets_what_was_committed(patch: pytest.MonkeyPatch) -> None:
    def after(history: History, record: Record) -> History:
        return history if isinstance(record, Update) else history_after(history, record)

    patch.setattr("fedoap.protocol.rounds.after", after)


def _sends_a_personal_part(patch: pytest.MonkeyPatch) -> None:
    def fail(self: Hand, task: bytes, reason: str, now: float) -> None:
        right(self, task, "tensor personal.head.weight is not finite", now)

    right = Hand.work_failed
    patch.setattr(Hand, "work_failed", fail)


def _is_content_with_less_than_a_quorum(patch: pytest.MonkeyPatch) -> None:
    def one_less(self: Rounds, manifest: TaskManifest) -> int:
        return max(1, right(self, manifest) - 1)

    right = Rounds._quorum
    patch.setattr(Rounds, "_quorum", one_less)


def _says_durable_before_it_is(patch: pytest.MonkeyPatch) -> None:
    def chunk(self: Uploads, *args: object) -> list[CoordinatorEffect]:
        return sorted(right(self, *args), key=lambda effect: not isinstance(effect, SyncPart))  # type: ignore[arg-type]

    right = Uploads.chunk
    patch.setattr(Uploads, "chunk", chunk)


def _goes_on_after_a_gap(patch: pytest.MonkeyPatch) -> None:
    """Resume from an offset that nobody recorded."""

    def resume(self: Uploads, arriving: Arriving, now: float) -> None:
        blob = arriving.manifest.blob
        right(
            self, replace(arriving, at=min(blob.size // CHUNK_BYTES, arriving.at // CHUNK_BYTES + 1) * CHUNK_BYTES), now
        )

    right = Uploads.resume
    patch.setattr(Uploads, "resume", resume)


@pytest.mark.parametrize(
    ("plant", "caught"),
    [
        (_counts_twice, "an update was counted twice"),
        (_looks_only_when_something_is_stored, "no end in sight"),
        (_takes_late_uploads, "an update of another task was recorded"),
        (_forgets_credit_at_the_site, "a site sent more than it had credit for"),
        (_admits_everyone, "too many uploads hold credit"),
        (_announces_before_recording, "a task was sent that is not on record"),
        (_commits_what_is_not_durable, "an upload was committed that is not durable"),
        (_forgets_what_was_committed, "no end in sight"),
        (_says_durable_before_it_is, "bytes are not those of its manifest"),
        (_goes_on_after_a_gap, "goes on where it is not known to be durable"),
        (_sends_a_personal_part, "a personal parameter's name occurs"),
        (_is_content_with_less_than_a_quorum, "merged without a quorum"),
    ],
)
def test_a_wrong_machine_is_caught(plant: Plant, caught: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _undisturbed()
    monkeypatch.setattr("simulated.world.END_SECONDS", 20_000.0)
    plant(monkeypatch)

    with pytest.raises(AssertionError, match=caught):
        _storms()


def _storms() -> None:
    """Rough worlds, in which sites are away for longer than they are waited for."""
    rough = Faults(0.1, 0.1, 0.3, cut=0.05, crash_coordinator=0.01, crash_site=0.01, work_fails=0.05, outage=200.0)
    for seed in range(1, 41):
        _run(EVERYONE, seed, _storm(seed))
        _run(ONLY_TRAINING, seed, rough)
