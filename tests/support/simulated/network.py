"""A network that loses, repeats, reorders, delays, corrupts and splits; and the clock that all go by."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Deliver = Callable[[bytes, bytes], None]


@dataclass(frozen=True, slots=True)
class Spell:
    """Something that lasts a while: some sites are cut off, the disks of some are full, or the keys of some revoked."""

    kind: Literal["cut off", "full", "revoked"]
    at: float
    seconds: float
    whom: frozenset[int]
    """Sites by number; -1 is the coordinator, who is cut off from all of them."""


@dataclass(frozen=True)
class Faults:
    """Chances, each of one event; all 0 is a quiet world."""

    lose: float = 0.0
    repeat: float = 0.0
    delay: float = 0.0
    corrupt: float = 0.0
    """That up to three bits of a message flip: on real lines CURVE turns such a message into a lost one."""
    cut: float = 0.0
    """That a message breaks the connection that it is sent on."""
    crash_coordinator: float = 0.0
    """Before one effect is carried out, and before each step of storing one."""
    crash_site: float = 0.0
    disk_full: float = 0.0
    work_fails: float = 0.0
    outage: float = 20.0
    """Seconds, at most, until what crashed or was cut is back; above 60 the others go on without it."""
    spells: tuple[Spell, ...] = ()
    tick: float = 2.0
    work: float = 10.0
    """Seconds, at most, that a task takes."""

    @classmethod
    def of(cls, rng: random.Random) -> "Faults":
        """Each kind of fault is absent in half of all worlds, and of any strength up to its bound in the others."""
        bounds = {
            "lose": 0.2,
            "repeat": 0.2,
            "delay": 0.5,
            "corrupt": 0.1,
            "cut": 0.02,
            "crash_coordinator": 0.02,
            "crash_site": 0.02,
            "disk_full": 0.1,
        }
        chances = {name: rng.random() * bound if rng.random() < 0.5 else 0.0 for name, bound in bounds.items()}
        spells = tuple(_spell(rng) for _ in range(rng.choice((0, 0, 1, 2))))
        return cls(
            **chances,
            outage=rng.choice((2.0, 5.0, 5.0, 20.0, 20.0, 20.0, 200.0)),
            spells=spells,
            tick=rng.choice((2.0, 10.0, 10.0, 25.0)),
        )


def _spell(rng: random.Random) -> Spell:
    whom = frozenset(rng.sample((-1, 0, 1, 2), rng.choice((1, 1, 2))))
    return Spell(rng.choice(("cut off", "full", "revoked")), rng.random() * 30, rng.choice((5.0, 20.0, 100.0)), whom)


@dataclass(slots=True)
class Clock:
    """What is to happen, in order of time."""

    now: float = 0.0
    _queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: int = 0

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + seconds, self._count, action))

    def step(self) -> None:
        self.now, _, action = heapq.heappop(self._queue)
        action()


class Network:
    """Carries one message: perhaps never, perhaps twice, perhaps late, so that later ones overtake it."""

    def __init__(self, clock: Clock, rng: random.Random, faults: Faults) -> None:
        self._clock, self._rng, self._faults = clock, rng, faults
        self.cut_off: set[str] = set()
        self.corrupted = 0

    def carry(self, site: str, header: bytes, body: bytes, deliver: Deliver) -> None:
        """Carry a message between this site and the coordinator."""
        faults, chance = self._faults, self._rng.random
        if site in self.cut_off or (faults.lose and chance() < faults.lose):
            return
        if faults.corrupt and chance() < faults.corrupt:
            header, body = self._corrupt(header, body)
        self._later(faults, lambda: deliver(header, body))
        if faults.repeat and chance() < faults.repeat:
            self._later(faults, lambda: deliver(header, body))

    def _later(self, faults: Faults, deliver: Callable[[], None]) -> None:
        late = self._rng.random() * 4 if faults.delay and self._rng.random() < faults.delay else 0.0
        self._clock.after(0.01 + late, deliver)

    def _corrupt(self, header: bytes, body: bytes) -> tuple[bytes, bytes]:
        self.corrupted += 1
        if body and self._rng.random() < 0.5:
            return header, self._flip(body)
        return self._flip(header), body

    def _flip(self, data: bytes) -> bytes:
        flipped = bytearray(data)
        for _ in range(self._rng.choice((1, 1, 2, 3))):
            bit = self._rng.randrange(8 * len(data))
            flipped[bit // 8] ^= 1 << bit % 8
        return bytes(flipped)
