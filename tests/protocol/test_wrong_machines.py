"""Protocol machines and stores that are wrong on purpose: each is caught by some of a few seeds.

The simulated disk keeps volatile and durable bytes of each part apart (`simulated.disk`), so a machine that
goes on behind the last sync finds, after some crash, other bytes there than it wrote.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from federation_builders import CHUNK_BYTES
from fedoap.manifests import TaskManifest
from fedoap.protocol.events import Arriving, CoordinatorEffect, SyncPart, Update
from fedoap.protocol.exchange import Exchange, Tally
from fedoap.protocol.hand import Hand
from fedoap.protocol.history import History, OpenExchange, Record
from fedoap.protocol.history import after as history_after
from fedoap.protocol.rounds import Rounds
from fedoap.protocol.uploads import Uploads
from fedoap.seal import TAG_BYTES, Seal
from fedoap.transfer import Admission, Range, Receiver, Sender
from simulated import schedules
from simulated.disk import Disk, Name
from simulated.memory import many_worlds
from simulated.network import Faults
from simulated.schedules import EVERYONE, ONLY_TRAINING

SEEDS = 80


@pytest.fixture(autouse=True)
def _cheap() -> Iterator[None]:
    with many_worlds():
        for is_small in (True, False):
            schedules.quiet(is_small)  # before anything is wrong
        yield


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


def _seals_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Seal, "close", lambda _self, _at, plain: bytes(plain) + bytes(TAG_BYTES))
    patch.setattr(Seal, "open", lambda _self, _at, sealed: bytes(sealed)[:-TAG_BYTES])


def _takes_late_uploads(patch: pytest.MonkeyPatch) -> None:
    def anything_goes(self: Rounds, task: bytes, site: str) -> OpenExchange:
        return self.history.open or right(self, task, site)

    right = Rounds.require
    patch.setattr(Rounds, "require", anything_goes)
    _seals_nothing(patch)  # what is sealed for another exchange does not open: the seal alone would keep it out


def _forgets_credit_at_the_site(patch: pytest.MonkeyPatch) -> None:
    def all_of_it(self: Sender, at: int, upto: int) -> list[Range]:
        return right(self, at, self._size)

    right = Sender.go
    patch.setattr(Sender, "go", all_of_it)


def _gives_credit_without_a_bound(patch: pytest.MonkeyPatch) -> None:
    def grant(self: Receiver, now: float) -> int:
        self.upto = self.blob.size
        return self.upto

    patch.setattr(Receiver, "grant", grant)


def _does_not_look_at_what_was_open_at_the_start(patch: pytest.MonkeyPatch) -> None:
    def start(self: Rounds, now: float) -> list[object]:
        self.now = now
        return []

    patch.setattr(Rounds, "start", start)


def _syncs_nothing(patch: pytest.MonkeyPatch) -> None:
    """The store's fdatasync is left out: a name lasts longer than the bytes behind it."""

    def sync(self: Disk, name: Name) -> None:
        assert self.has(name)

    patch.setattr(Disk, "sync", sync)


def _syncs_no_folder(patch: pytest.MonkeyPatch) -> None:
    def sync_folders(self: Disk) -> None:
        assert self.names("blobs") is not None

    patch.setattr(Disk, "sync_folders", sync_folders)


def _says_durable_before_it_is(patch: pytest.MonkeyPatch) -> None:
    def chunk(self: Uploads, *args: object) -> list[CoordinatorEffect]:
        return sorted(right(self, *args), key=lambda effect: not isinstance(effect, SyncPart))  # type: ignore[arg-type]

    right = Uploads.chunk
    patch.setattr(Uploads, "chunk", chunk)


def _goes_on_after_a_gap(patch: pytest.MonkeyPatch) -> None:
    """Resume from an offset that nobody recorded."""

    def resume(self: Uploads, arriving: Arriving, now: float) -> None:
        size, next_chunk = arriving.manifest.blob.size, arriving.at // CHUNK_BYTES + 1
        right(self, replace(arriving, at=min(size // CHUNK_BYTES, next_chunk) * CHUNK_BYTES), now)

    right = Uploads.resume
    patch.setattr(Uploads, "resume", resume)


def _takes_any_bytes(patch: pytest.MonkeyPatch) -> None:
    """No hash is compared, so a flipped bit of a body goes by."""

    def take(self: Receiver, at: int, body: memoryview, now: float) -> str:
        size, _ = self.blob.chunk(at)
        if at != self.at or self.is_complete or len(body) not in (size, size + TAG_BYTES) or at + size > self.upto:
            return "gap" if at > self.at else "repeated"
        self.at += size
        return "new"

    patch.setattr(Receiver, "take", take)
    _seals_nothing(patch)


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


@pytest.mark.parametrize(
    ("plant", "caught"),
    [
        (_counts_twice, "an update was counted twice"),
        (_looks_only_when_something_is_stored, "no end in sight"),
        (_does_not_look_at_what_was_open_at_the_start, "an exchange was opened while another was open"),
        (_takes_late_uploads, "an update of another task was recorded"),
        (_forgets_credit_at_the_site, "a site sent more than it had credit for"),
        (_gives_credit_without_a_bound, "an upload holds more than one window of credit"),
        (_admits_everyone, "too many uploads hold credit"),
        (_announces_before_recording, "a task was sent that is not on record"),
        (_commits_what_is_not_durable, "an upload was committed that is not durable"),
        (_forgets_what_was_committed, "two updates of one site were recorded for one task"),
        (_sends_a_personal_part, "a personal parameter's name occurs"),
        (_is_content_with_less_than_a_quorum, "merged without a quorum"),
        (_syncs_nothing, "is damaged|another than in the quiet world|not that of the updates that counted"),
        (_syncs_no_folder, "a blob is missing, but the ledger needs it"),
        (_says_durable_before_it_is, "is damaged"),
        (_goes_on_after_a_gap, "goes on where it is not known to be durable"),
        (_takes_any_bytes, "is damaged|another than in the quiet world|not that of the updates that counted"),
    ],
)
def test_a_wrong_machine_is_caught(plant: Plant, caught: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulated.world.END_SECONDS", 20_000.0)
    plant(monkeypatch)

    with pytest.raises(AssertionError, match=caught):
        _storms()


def test_the_same_storms_do_a_right_machine_no_harm() -> None:
    happened = _storms()

    assert happened["schedules"] == 3 * (SEEDS - 1)
    assert all(happened[what] for what in ("crashes", "writes lost or torn", "messages corrupted"))


def _storms() -> Counter[str]:
    """Return what happened in rough worlds, in which sites are away for longer than they are waited for."""
    happened = Counter[str]()
    rough = Faults(
        0.1, 0.1, 0.3, corrupt=0.05, cut=0.05, crash_coordinator=0.02, crash_site=0.02, work_fails=0.05, outage=200.0
    )
    for seed in range(1, SEEDS):
        schedules.run(EVERYONE, seed, Faults.of(random.Random(seed)), happened)
        schedules.run(ONLY_TRAINING, seed, rough, happened)
        schedules.check(seed, happened)
    return happened
