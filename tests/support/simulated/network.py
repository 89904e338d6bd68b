"""A network that loses, repeats, reorders and delays, and cuts connections; and the clock that all go by."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

TICK_SECONDS = 2.0


@dataclass(frozen=True)
class Faults:
    """Chances, each of one event; all 0 is a quiet world."""

    lose: float = 0.0
    repeat: float = 0.0
    delay: float = 0.0
    cut: float = 0.0
    """That a message breaks the connection that it is sent on."""
    crash_coordinator: float = 0.0
    """Before one effect is carried out."""
    crash_site: float = 0.0
    disk_full: float = 0.0
    work_fails: float = 0.0
    outage: float = 20.0
    """Seconds, at most, until what crashed or was cut is back; above 60 the others go on without it."""

    @classmethod
    def of(cls, rng: random.Random) -> "Faults":
        """Each kind of fault is absent in half of all worlds, and of any strength up to its bound in the others."""
        bounds = {
            "lose": 0.2,
            "repeat": 0.2,
            "delay": 0.5,
            "cut": 0.02,
            "crash_coordinator": 0.01,
            "crash_site": 0.01,
            "disk_full": 0.1,
        }
        chances = {name: rng.random() * bound if rng.random() < 0.5 else 0.0 for name, bound in bounds.items()}
        return cls(**chances, outage=rng.choice([5.0, 20.0, 200.0]))


@dataclass
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

    def carry(self, deliver: Callable[[], None]) -> None:
        if self._rng.random() < self._faults.lose:
            return
        for _ in range(2 if self._rng.random() < self._faults.repeat else 1):
            late = self._rng.random() * 4 if self._rng.random() < self._faults.delay else 0.0
            self._clock.after(0.01 + late, deliver)
