"""Whole federations in worlds of chance: one seed, one world, and what must hold in each.

`FEDOAP_SIMULATION_SEEDS=100000 pytest tests/protocol/test_simulation.py` looks at more of them, and
`FEDOAP_SIMULATION_FIRST=4711` starts at another seed; a failure names the seed that shows it again.
`make soak` looks at a million.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from simulated import schedules
from simulated.memory import many_worlds
from simulated.network import Faults
from simulated.schedules import EVERYONE

FIRST = int(os.environ.get("FEDOAP_SIMULATION_FIRST", "1"))
SEEDS = int(os.environ.get("FEDOAP_SIMULATION_SEEDS", "20000"))
BATCH = 1000


@pytest.fixture(autouse=True)
def _cheap() -> Iterator[None]:
    with many_worlds():
        yield


@pytest.fixture(scope="module")
def counts() -> Iterator[Counter[str]]:
    """What was looked at, said at the end (`-s` shows it)."""
    counted, began = Counter[str](), time.monotonic()
    yield counted
    rate = counted["schedules"] / (time.monotonic() - began)
    said = ", ".join(f"{number} {what}" for what, number in counted.items())
    sys.stdout.write(f"\nschedules: {said}, {rate:.0f} schedules a second: 0 failures\n")


def test_the_quiet_world_runs_the_course_without_a_second_attempt() -> None:
    closed = schedules.run(EVERYONE, 0, Faults()).closed

    assert [one.outcome for one in closed] == ["done"] * 6


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, BATCH))
def test_whatever_happens_every_run_ends_with_the_model_of_the_updates_that_count(
    first: int, counts: Counter[str]
) -> None:
    for seed in range(first, min(first + BATCH, FIRST + SEEDS)):
        schedules.check(seed, counts)
